"""predict_with_generate: answers are those of greedy search row by row, at any time, on any number of processes."""

import copy
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import DataCollatorForSeq2Seq, GenerationConfig, TrainerCallback

from tests.evaluate.test_generate import greedy_by_hand
from tests.tiny import make_byte_tokenizer
from tests.train import answer_ranks
from tests.train.rows import make_trainer, reference_gradients, token_rows
from tunesmith.config import DecodingConfig
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluate.generate import stop_token_ids
from tunesmith.evaluate.metrics import metrics_for
from tunesmith.train.generation import asked
from tunesmith.train.options import SFTConfig
from tunesmith.train.sft import SFTTrainer

ROOT = Path(__file__).parents[2]
LENGTH = 6
DROPOUT = {"attention_dropout": 0.5, "num_hidden_layers": 1}
CHATS = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in (("2+2?", "4"), ("a longer question?", "你好，世界"), ("1?", "one"))
]


def writing(model, tokenizer, tmp_path, train=None, **options) -> SFTTrainer:
    metrics = options.pop("compute_metrics", None)
    defaults = {"predict_with_generate": True, "generation_max_length": LENGTH, "eval_dataset": token_rows()}
    trainer = make_trainer(model, tokenizer, train, tmp_path, **{**defaults, **options})
    trainer.compute_metrics = metrics
    return trainer


def by_hand(model, tokenizer, rows):
    """What greedy search answers to each row alone, without padding and without a cache."""
    model = copy.deepcopy(model).eval()
    stops = stop_token_ids(model, tokenizer)
    prompts = [asked(row["input_ids"], row["labels"])[0] for row in rows]
    return [greedy_by_hand(model, prompt, LENGTH, stops) for prompt in prompts]


def answers_of(output, tokenizer):
    """Rows of ids without the padding behind them."""
    stops = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    found = []
    for row in output.predictions.tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), LENGTH)
        assert set(row[end:]) <= {tokenizer.pad_token_id}
        found.append(row[:end])
    return found


# ---- what is written ------------------------------------------------------------------------------------------------


# workflow: P5
def test_the_prompt_is_what_stands_before_the_last_trained_run():
    assert asked([1, 2, 3, 4, 5, 6], [-100, 2, -100, 4, 5, -100]) == ([1, 2, 3], [4, 5])
    assert asked([1, 2, 3], [-100, -100, 3]) == ([1, 2], [3])
    assert asked([1, 2], [1, 2]) == ([], [1, 2])
    assert asked([1, 2], [-100, -100]) == ([1, 2], [])


# workflow: R2 P5
@pytest.mark.parametrize("size", [1, 3, 8])
def test_answers_to_prompts_of_unequal_length_are_those_of_each_alone(make_tiny_model, byte_tokenizer, tmp_path, size):
    rows = token_rows()
    trainer = writing(make_tiny_model(), byte_tokenizer, tmp_path, per_device_eval_batch_size=size)
    output = trainer.predict(rows)
    assert answers_of(output, byte_tokenizer) == by_hand(trainer.model, byte_tokenizer, rows)
    assert [list(prompt) for prompt in output.prompts] == [asked(r["input_ids"], r["labels"])[0] for r in rows]
    labels = [[token for token in row if token != -100] for row in output.label_ids.tolist()]
    assert labels == [[token for token in row["labels"] if token != -100] for row in rows]


# workflow: R2
@pytest.mark.parametrize("lora", [False, True])
def test_evaluation_in_the_middle_of_training_writes_what_the_model_of_that_step_answers(
    make_tiny_model, byte_tokenizer, tmp_path, lora
):
    seen, rows = [], token_rows()

    def metric(predictions, references):
        expected = by_hand(trainer.accelerator.unwrap_model(trainer.model), byte_tokenizer, rows)
        texts = [byte_tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
        seen.append(predictions == texts)
        return {"same": 1.0}

    options = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "gradient_checkpointing": True}
    if lora:
        options["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.5)
    model = make_tiny_model(**DROPOUT)
    trainer = writing(model, byte_tokenizer, tmp_path, rows, learning_rate=0.1, **options)
    trainer.text_metric = metric
    model.config.use_cache = False
    trainer.train()
    assert seen == [True, True]
    assert [line["eval_same"] for line in trainer.state.log_history if "eval_same" in line] == [1.0, 1.0]


# workflow: R2
def test_a_training_run_does_not_notice_that_answers_are_written(make_tiny_model, byte_tokenizer, tmp_path):
    class Unchanged(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.own = model.generation_config.to_dict()

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            assert model.generation_config.to_dict() == self.own

    def losses(name, **options):
        options = {"max_steps": 4, "max_grad_norm": 1.0, "per_device_train_batch_size": 2, **options}
        model = make_tiny_model(**DROPOUT)
        trainer = writing(model, byte_tokenizer, tmp_path / name, token_rows(), **options)
        trainer.add_callback(Unchanged())
        trainer.train()
        return [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]

    plain = losses("plain", predict_with_generate=False)
    assert losses("greedy", eval_strategy="steps", eval_steps=1) == plain
    beams = {"generation_config": GenerationConfig(do_sample=True, num_beams=2, max_new_tokens=3)}
    assert losses("beams", eval_strategy="steps", eval_steps=1, **beams) == plain


# workflow: R2
def test_evaluation_leaves_model_and_random_numbers_as_they_were(make_tiny_model, byte_tokenizer, tmp_path):
    model = make_tiny_model(**DROPOUT)
    trainer = writing(model, byte_tokenizer, tmp_path)
    model.train()
    model.model.layers[0].eval()
    modes, own = [module.training for module in model.modules()], model.generation_config
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    trainer.evaluate(do_sample=True)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is own
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


# workflow: P5
def test_packed_rows_are_asked_one_document_at_a_time(make_tiny_model, byte_tokenizer, tmp_path):
    rows = token_rows()
    packed = [
        {key: [token for row in part for token in row[key]] for key in ("input_ids", "labels")}
        | {"seq_lengths": [len(row["input_ids"]) for row in part]}
        for part in ([rows[0], rows[1], rows[2]], [rows[3]])
    ]
    seen = {}

    def metrics(prediction):
        return seen.update(prediction=prediction) or {}

    trainer = writing(make_tiny_model(), byte_tokenizer, tmp_path, eval_dataset=packed, compute_metrics=metrics)
    trainer.evaluate()
    assert answers_of(seen["prediction"], byte_tokenizer) == by_hand(
        trainer.model, byte_tokenizer, rows.select(range(4))
    )


def test_predict_keeps_the_order_of_rows_that_training_packs(make_tiny_model, byte_tokenizer, tmp_path):
    trainer = writing(make_tiny_model(), byte_tokenizer, tmp_path, packing=True, eval_dataset=None)
    output = trainer.predict(CHATS)
    asked_for = [byte_tokenizer.decode(prompt) for prompt in output.prompts]
    assert [chat["messages"][0]["content"] in text for chat, text in zip(CHATS, asked_for)] == [True] * 3
    assert trainer.args.eval_packing is None


def test_a_row_that_is_trained_from_its_first_token_is_an_error(make_tiny_model, byte_tokenizer, tmp_path):
    rows = [*token_rows((5,)), {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    trainer = writing(make_tiny_model(), byte_tokenizer, tmp_path, eval_dataset=rows)
    with pytest.raises(DataError, match=r"row 2 of the evaluation set is trained from its first token.*train_on"):
        trainer.evaluate()


def test_a_stream_and_a_collator_of_ones_own_are_answered_alike(make_tiny_model, byte_tokenizer, tmp_path):
    rows = token_rows()
    expected = writing(make_tiny_model(), byte_tokenizer, tmp_path).evaluate()
    streamed = writing(make_tiny_model(), byte_tokenizer, tmp_path, eval_dataset=rows.to_iterable_dataset())
    collator = DataCollatorForSeq2Seq(byte_tokenizer)
    collated = writing(make_tiny_model(), byte_tokenizer, tmp_path, data_collator=collator)
    for trainer in (streamed, collated):
        trainer.text_metric = lambda predictions, references: {"seen": sum(map(len, predictions + references))}
    found = [trainer.evaluate() for trainer in (streamed, collated)]
    assert found[0]["eval_seen"] == found[1]["eval_seen"] > 0
    assert found[0]["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)


# ---- how it is decoded ----------------------------------------------------------------------------------------------


# workflow: C2 C3
def test_beams_of_the_arguments_are_used(make_tiny_model, byte_tokenizer, tmp_path):
    rows = token_rows()
    trainer = writing(make_tiny_model(), byte_tokenizer, tmp_path, generation_num_beams=3)
    found = trainer.predict(rows).predictions
    trainer.args.generation_num_beams = None
    assert found.tolist() != trainer.predict(rows).predictions.tolist()
    stops = stop_token_ids(trainer.model, byte_tokenizer)
    config = GenerationConfig(num_beams=3, max_new_tokens=LENGTH, eos_token_id=stops, pad_token_id=258)
    for row, answer in zip(rows, found.tolist()):
        prompt = torch.tensor([asked(row["input_ids"], row["labels"])[0]])
        new = (
            trainer.model.eval()
            .generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)[0, prompt.shape[1] :]
            .tolist()
        )
        assert answer[: len(new)] == new


# workflow: C3
def test_eval_num_beams_wins(make_tiny_model, byte_tokenizer, tmp_path):
    rows = token_rows()
    expected = writing(make_tiny_model(), byte_tokenizer, tmp_path, generation_num_beams=3).predict(rows)
    trainer = writing(make_tiny_model(), byte_tokenizer, tmp_path, generation_num_beams=1)
    trainer.decoding = DecodingConfig(eval_num_beams=3)
    assert trainer.predict(rows).predictions.tolist() == expected.predictions.tolist()


# workflow: C2
def test_the_longest_answer_counts_new_tokens(make_tiny_model, byte_tokenizer, tmp_path):
    trainer = writing(make_tiny_model(), byte_tokenizer, tmp_path, generation_max_length=4)
    assert trainer.predict(token_rows((60, 9))).predictions.shape == (2, 4)
    assert trainer.predict(token_rows((60, 9)), max_length=3).predictions.shape == (2, 3)
    trainer.args.generation_max_length, trainer.args.max_target_length = None, 5
    assert trainer.predict(token_rows((60, 9))).predictions.shape == (2, 5)


def test_options_of_a_call_hold_for_that_call_and_every_set(make_tiny_model, byte_tokenizer, tmp_path):
    sets = {"one": token_rows((5, 9)), "two": token_rows((7,))}
    trainer = writing(make_tiny_model(), byte_tokenizer, tmp_path, eval_dataset=sets)
    widths = []
    trainer.compute_metrics = lambda found: widths.append(found.predictions.shape) or {"rows": len(found.label_ids)}
    found = trainer.evaluate(max_new_tokens=2)
    assert (found["eval_one_rows"], found["eval_two_rows"]) == (2, 1)
    trainer.evaluate()
    assert widths == [(2, 2), (1, 2), (2, LENGTH), (1, LENGTH)]
    with pytest.raises(ConfigError, match=r"no decoding option 'max_token'\. Did you mean 'max_"):
        trainer.evaluate(max_token=2)


def test_a_generation_config_in_the_arguments_is_followed(make_tiny_model, byte_tokenizer, tmp_path):
    own = GenerationConfig(max_new_tokens=3, suppress_tokens=list(range(200)), num_beams=2)
    trainer = writing(make_tiny_model(), byte_tokenizer, tmp_path, generation_config=own)
    found = trainer.predict(token_rows()).predictions
    assert found.shape == (8, 3)
    assert found.min() >= 200
    assert own.eos_token_id is None
    assert trainer.predict(token_rows(), max_new_tokens=2).predictions.shape == (8, 2)


# ---- how it is scored and saved -------------------------------------------------------------------------------------


# workflow: R4
def test_compute_metrics_gets_ids_that_can_be_decoded(make_tiny_model, byte_tokenizer, tmp_path):
    def metrics(prediction):
        labels = np.where(prediction.label_ids != -100, prediction.label_ids, byte_tokenizer.pad_token_id)
        texts = [byte_tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (prediction[0], labels)]
        return {"rows": len(texts[0]), "label": texts[1][0]}

    trainer = SFTTrainer(
        make_tiny_model(),
        SFTConfig(tmp_path, predict_with_generate=True, generation_num_beams=2, generation_max_length=4, use_cpu=True),
        eval_dataset=CHATS,
        processing_class=byte_tokenizer,
        compute_metrics=metrics,
    )
    found = trainer.evaluate()
    assert (found["eval_rows"], found["eval_label"]) == (3, "4")
    assert "eval_exact_match" not in found


# workflow: R4 W4
def test_scores_and_the_right_loss_stand_beside_each_other(make_tiny_model, byte_tokenizer, tmp_path):
    trainer = writing(make_tiny_model(), byte_tokenizer, tmp_path)
    expected = reference_gradients(make_tiny_model(), token_rows())[0]
    assert trainer.evaluate()["eval_exact_match"] == 0.0
    trainer.text_metric = metrics_for("bleu_rouge", ())
    output = trainer.predict(token_rows(), metric_key_prefix="predict")
    scores = {"predict_rouge-1", "predict_rouge-2", "predict_rouge-l", "predict_bleu-4"}
    speed = {"predict_runtime", "predict_samples_per_second", "predict_steps_per_second"}
    assert scores | speed <= output.metrics.keys()
    assert output.metrics["predict_loss"] == pytest.approx(expected, abs=1e-5)


# workflow: R4
def test_without_predict_with_generate_nothing_is_written(make_tiny_model, byte_tokenizer, tmp_path):
    trainer = writing(make_tiny_model(), byte_tokenizer, tmp_path, predict_with_generate=False)
    trainer.text_metric = metrics_for("exact_match", ())
    assert "eval_exact_match" not in trainer.evaluate()
    assert trainer.predict(token_rows()).predictions.shape == (8, 17, 259)


# workflow: R3
def test_predictions_are_saved_in_the_order_of_the_rows(make_tiny_model, tmp_path):
    tokenizer = make_byte_tokenizer()
    trainer = writing(make_tiny_model(), tokenizer, tmp_path, eval_dataset=None)
    results = trainer.predict(CHATS)
    path = trainer.save_predictions(results)
    assert path == tmp_path / "generated_predictions.jsonl"
    text = path.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [list(row) for row in rows] == [["index", "prompt", "label", "predict"]] * 3
    assert [(row["index"], row["label"]) for row in rows] == [(0, "4"), (1, "你好，世界"), (2, "one")]
    assert "你好" in text
    assert rows[0]["prompt"] == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert not any("<|" in row["predict"] + row["label"] for row in rows)


# workflow: R3
def test_only_the_first_process_saves(make_tiny_model, byte_tokenizer, tmp_path, monkeypatch):
    trainer = writing(make_tiny_model(), byte_tokenizer, tmp_path)
    results = trainer.predict(token_rows((5,)))
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    assert not trainer.save_predictions(results).exists()


# ---- several processes ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*command, "-m", "tests.train.answer_ranks", str(folder)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return folder, [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


# workflow: R2 R3
def test_two_processes_write_each_answer_once_and_in_order(two_processes, tmp_path):
    folder, found = two_processes
    expected = answer_ranks.everything(tmp_path)
    for name in ("trained", "streamed"):
        for one in found:
            assert one["trained"]["losses"] == pytest.approx(expected["trained"]["losses"], abs=1e-5)
            assert one[name]["predictions"] == expected[name]["predictions"]
            assert one[name]["seen"] == expected[name]["seen"]
        files = [path / name / "generated_predictions.jsonl" for path in (folder, tmp_path)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert found[0]["predicted"] == found[1]["predicted"] == expected["predicted"]
    assert (folder / "predicted.jsonl").read_bytes() == (tmp_path / "predicted.jsonl").read_bytes()
    assert not list(folder.glob("*.rank*.jsonl")) + list(folder.glob("*.jsonl.rank*"))


def test_two_processes_that_hold_parts_of_one_model_answer_as_one_does(two_processes):
    _, (first, second) = two_processes
    assert first["sharded"] | second["sharded"] == answer_ranks.sharded()
    assert second["sharded"].keys() | first["sharded"].keys() == set("01234")
