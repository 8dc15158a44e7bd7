"""Stage rm: the loss over pairs is what it says for every layout, accumulation and number of processes; it resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests.tiny import make_byte_tokenizer, make_tiny_model
from tunesmith.data.pairs import PAIR_TYPES, first_difference
from tunesmith.errors import CheckpointError, ConfigError, DataError
from tunesmith.model.value_head import RewardModel, load_reward_model
from tunesmith.train.options import SFTConfig
from tunesmith.train.reward import RewardConfig, RewardTrainer, score

ROOT = Path(__file__).parents[2]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
LENGTHS = ((9, 14), (12, 8), (10, 10), (17, 9), (8, 11), (13, 7), (9, 9), (11, 16))
POLITE = [
    {"prompt": f"say {word}", "chosen": f"yes, {word}", "rejected": f"no {word}{'!' * (len(word) % 3)}"}
    for word in ("one", "two", "three", "four", "five", "six", "seven", "eight")
]


def pair_rows(lengths=LENGTHS, seed=0) -> datasets.Dataset:
    """Random ids; both conversations of a pair begin with the same five."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, sizes in enumerate(lengths):
        prompt, *answers = (
            torch.randint(0, 256, (size,), generator=generator).tolist() for size in (5, *(n - 5 for n in sizes))
        )
        chosen, rejected = (prompt + answer for answer in answers)
        begin = first_difference(chosen, rejected)
        rows.append(dict(zip(PAIR_TYPES, (index, chosen, rejected, begin))))
    return datasets.Dataset.from_list(rows, features=PAIR_TYPES)


def make_reward_trainer(folder, model=None, rows=None, **options) -> RewardTrainer:
    """A float32 trainer on the CPU that takes the pairs in their order."""
    defaults = {
        "output_dir": str(folder),
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
    }
    given = {name: options.pop(name) for name in ("peft_config", "eval_dataset", "compute_metrics") if name in options}
    return RewardTrainer(
        make_tiny_model() if model is None else model,
        RewardConfig(**{**defaults, **options}),
        train_dataset=pair_rows() if rows is None else rows,
        processing_class=make_byte_tokenizer(),
        **given,
    )


def first_gradients(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first optimizer step, over its micro-batches."""
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    batches = iter(trainer.get_train_dataloader())
    samples, items = trainer.get_batch_samples(batches, trainer.args.gradient_accumulation_steps, trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(samples)
    loss = sum(trainer.training_step(trainer.model, sample, items).item() for sample in samples)
    named = trainer.model.named_parameters()
    return loss, {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def plain_gradients(model: RewardModel, rows, reward_loss="span") -> tuple[float, dict[str, torch.Tensor]]:
    """The same pair by pair, from the definition, the language model run by itself."""
    total = torch.zeros(())
    for row in rows:
        good, bad = (rewards_of(model, row[f"{side}_input_ids"]) for side in ("chosen", "rejected"))
        begin, end = row["first_difference"], max(len(good), len(bad))
        if reward_loss == "last_token":
            losses = [F.logsigmoid(good[-1] - bad[-1])]
        else:
            last = len(good) - 1, len(bad) - 1
            losses = [F.logsigmoid(good[min(t, last[0])] - bad[min(t, last[1])]) for t in range(begin, end)]
        total = total - torch.stack(losses).mean()
    (total / len(rows)).backward()
    named = model.named_parameters()
    return (total / len(rows)).item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def rewards_of(model: RewardModel, ids) -> torch.Tensor:
    hidden = model.base(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    return hidden @ model.v_head.summary.weight[0]


def assert_same(found, expected, tolerance=1e-6):
    assert found[0] == pytest.approx(expected[0], abs=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=tolerance, rtol=1e-4, msg=name)


# The loss -----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "flat": {},
    "padded": {"padding_free": False},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "unevenly accumulated": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "checkpointed": {"gradient_checkpointing": True},
}


# workflow: W6
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reward_loss", ["span", "last_token"])
@pytest.mark.parametrize("lora", [True, False])
def test_every_layout_equals_a_plain_loop_over_the_pairs(tmp_path, layout, reward_loss, lora):
    def base():
        torch.manual_seed(3)
        return get_peft_model(make_tiny_model(), LORA) if lora else make_tiny_model()

    expected = plain_gradients(RewardModel(base(), seed=7), pair_rows(), reward_loss)
    options = {**LAYOUTS[layout], "seed": 7, "reward_loss": reward_loss}
    assert_same(first_gradients(make_reward_trainer(tmp_path, base(), **options)), expected)


# workflow: W6
def test_the_loss_of_answers_of_one_length_is_the_eras(tmp_path):
    rows = pair_rows(((10, 10), (8, 8), (12, 12)))
    trainer = make_reward_trainer(tmp_path, rows=rows, padding_free=False, eval_dataset=rows, reward_loss="span")
    batch = trainer.data_collator(list(rows))
    rewards = trainer.model(**trainer._model_inputs(batch))
    losses = []  # pairs of rows i and i + 3, from the first token that differs to the end of the longer
    for good, bad, row in zip(rewards[:3], rewards[3:], rows):
        span = slice(row["first_difference"], max(len(row["chosen_input_ids"]), len(row["rejected_input_ids"])))
        losses.append(-F.logsigmoid(good[span] - bad[span]).mean())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-6)


# workflow: W6
def test_a_batch_holds_the_chosen_conversations_and_then_the_rejected(tmp_path):
    rows = pair_rows(((6, 7), (8, 6)))
    batch = make_reward_trainer(tmp_path, rows=rows).data_collator(list(rows))
    order = [rows[index][f"{side}_input_ids"] for side in ("chosen", "rejected") for index in (0, 1)]
    assert batch["input_ids"][0].tolist() == [token for ids in order for token in ids]
    assert batch["document_lengths"] == (6, 8, 7, 6)
    assert batch["chosen_last"].tolist() == [5, 13]
    assert batch["rejected_last"].tolist() == [20, 26]


def test_an_empty_batch_trains_nothing(tmp_path):
    trainer = make_reward_trainer(tmp_path)
    batch = trainer.data_collator([])
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=4)
    loss.backward()
    assert loss.item() == 0
    assert not trainer.model.v_head.summary.weight.grad.any()


# Evaluation ---------------------------------------------------------------------------------------------------------


# workflow: W6
@pytest.mark.parametrize("options", [{"per_device_eval_batch_size": n} for n in (1, 3, 8)] + [{"padding_free": False}])
@pytest.mark.parametrize("reward_loss", ["span", "last_token"])
def test_evaluation_is_the_same_for_every_batch_size_and_layout(tmp_path, options, reward_loss):
    model = RewardModel(make_tiny_model(), seed=42)
    rows = pair_rows()
    expected, _ = plain_gradients(model, rows, reward_loss)
    scores = np.array(
        [[rewards_of(model, row[f"{side}_input_ids"])[-1].item() for side in ("chosen", "rejected")] for row in rows]
    )
    found = make_reward_trainer(tmp_path, eval_dataset=rows, reward_loss=reward_loss, **options).evaluate()
    assert found["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert found["eval_accuracy"] == np.mean(scores[:, 0] > scores[:, 1])
    assert found["eval_margin"] == pytest.approx(np.mean(scores[:, 0] - scores[:, 1]), abs=1e-6)


# workflow: W6
def test_a_tie_is_no_success(tmp_path):
    trainer = make_reward_trainer(tmp_path, eval_dataset=pair_rows())
    trainer.model.v_head.summary.weight.data.zero_()
    found = trainer.evaluate()
    assert found["eval_accuracy"] == 0
    assert found["eval_loss"] == pytest.approx(np.log(2))


# workflow: W6
def test_predictions_are_two_scores_a_line_rounded_in_the_order_of_the_dataset(tmp_path):
    trainer = make_reward_trainer(tmp_path, per_device_eval_batch_size=3)
    output = trainer.predict(pair_rows())
    trainer.save_predictions(output)
    lines = [json.loads(line) for line in (tmp_path / "generated_predictions.jsonl").read_text().splitlines()]
    chosen, rejected = output.predictions
    assert [line["index"] for line in lines] == list(range(8))
    assert [line["chosen"] for line in lines] == [round(float(value), 2) for value in chosen]
    assert [line["rejected"] for line in lines] == [round(float(value), 2) for value in rejected]
    assert output.metrics["test_accuracy"] == np.mean(chosen > rejected)


def test_a_prediction_names_the_row_it_is_of_where_rows_were_dropped(tmp_path):
    rows = [POLITE[0], {**POLITE[1], "rejected": POLITE[1]["chosen"]}, POLITE[2]]
    trainer = make_reward_trainer(tmp_path)
    output = trainer.predict(rows)
    assert output.label_ids.tolist() == [0, 2]
    assert trainer.reports["test_dataset"].drops[0][1:3] == (2, "equal-answers")


def test_several_evaluation_sets_and_a_metric_of_ones_own(tmp_path):
    def spread(prediction):
        chosen, rejected = prediction.predictions
        return {"spread": float(np.abs(chosen - rejected).max())}

    sets = {"tokens": pair_rows(), "texts": POLITE}
    found = make_reward_trainer(tmp_path, eval_dataset=sets, compute_metrics=spread).evaluate()
    names = {f"eval_{key}_{name}" for key in sets for name in ("loss", "accuracy", "margin", "spread")}
    assert names <= found.keys()


def test_a_margin_is_not_left_out_in_silence(tmp_path):
    with pytest.warns(UserWarning, match="train_dataset: the column margin is not read"):
        make_reward_trainer(tmp_path, rows=[row | {"margin": 5.0} for row in POLITE])


def test_one_set_is_scored_at_a_time(tmp_path):
    with pytest.raises(ConfigError, match=r"test_dataset is a dict of datasets \(a, b\). Give one of them"):
        make_reward_trainer(tmp_path).predict({"a": POLITE, "b": POLITE})


def test_pairs_of_like_length_are_near_each_other(tmp_path):
    options = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 2, "max_steps": 2}
    trainer = make_reward_trainer(tmp_path, rows=pair_rows(LENGTHS * 8), **options)
    order = [[sum(LENGTHS[pair % 8]) for pair in batch] for batch in trainer.get_train_dataloader().batch_sampler]
    drawn = np.array(order[1:])  # the longest come first
    assert np.abs(drawn[:, 0] - drawn[:, 1]).mean() < 1
    assert np.isfinite(trainer.train().training_loss)


# Training -----------------------------------------------------------------------------------------------------------


# workflow: W6
def test_a_preference_is_learned_and_holds_for_prompts_never_seen(tmp_path):
    unseen = [{"prompt": "say ten", "chosen": "yes, ten", "rejected": "no ten"}]
    trainer = make_reward_trainer(
        tmp_path,
        rows=POLITE,
        eval_dataset=unseen,
        num_train_epochs=25,
        per_device_train_batch_size=4,
        peft_config=LORA,
    )
    before = {name: value.clone() for name, value in trainer.model.base.state_dict().items() if "lora" not in name}
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert logged[-1]["loss"] < 0.2 < logged[0]["loss"]
    assert (logged[-1]["accuracy"], trainer.evaluate()["eval_accuracy"]) == (1.0, 1.0)
    assert all(torch.equal(value, trainer.model.base.state_dict()[name]) for name, value in before.items())


# workflow: V4 W1
@pytest.mark.parametrize("options", [{"peft_config": LORA}, {}], ids=["lora", "full"])
def test_a_resumed_run_equals_one_that_was_never_cut_short(tmp_path, options):
    def run(name, resume=None):
        given = {"per_device_train_batch_size": 2, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        trainer = make_reward_trainer(tmp_path / name, train_sampling_strategy="random", **given, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    again = run("again", str(tmp_path / "whole" / "checkpoint-3"))
    assert again.state.log_history[:-1] == whole.state.log_history[:-1]
    for (name, value), other in zip(whole.model.state_dict().items(), again.model.state_dict().values()):
        assert torch.equal(value, other), name


# workflow: V4
def test_a_checkpoint_without_a_value_head_is_no_checkpoint_of_stage_rm(tmp_path):
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "peft_config": LORA}
    make_reward_trainer(tmp_path, **options).train()
    for name in ("value_head.safetensors", "manifest.json"):
        (tmp_path / "checkpoint-1" / name).unlink()
    with pytest.raises(CheckpointError, match="checkpoint-1 holds no value head, so no stage rm wrote it"):
        make_reward_trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# workflow: R1 M9
def test_a_run_saves_adapter_head_and_tokenizer_and_no_base_weights(tmp_path):
    make_tiny_model().save_pretrained(tmp_path / "base")
    trainer = make_reward_trainer(
        tmp_path / "run", str(tmp_path / "base"), peft_config=LORA, max_steps=2, eval_dataset=POLITE
    )
    trainer.train()
    trainer.save_model()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_model.safetensors", "value_head.safetensors", "tokenizer_config.json"} <= names
    assert not [name for name in names if name.endswith(".bin") or name.startswith("model")]
    assert all(".lora_" in name for name in load_file(tmp_path / "run" / "adapter_model.safetensors"))


# workflow: M9
def test_a_run_goes_on_from_a_folder_with_a_head_and_scores_alike(tmp_path):
    make_tiny_model().save_pretrained(tmp_path / "base")
    trainer = make_reward_trainer(tmp_path / "run", str(tmp_path / "base"), peft_config=LORA, max_steps=2)
    trainer.train()
    trainer.save_model()
    expected = trainer.predict(pair_rows()).predictions
    for model in (str(tmp_path / "run"), load_reward_model(str(tmp_path / "run"), trainable=True)):
        found = make_reward_trainer(tmp_path / "next", model).predict(pair_rows()).predictions
        np.testing.assert_array_equal(found, expected)


def test_the_best_model_is_taken_back_with_its_head(tmp_path):
    options = {
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4},
        **{"load_best_model_at_end": True, "metric_for_best_model": "eval_margin", "greater_is_better": False},
    }
    trainer = make_reward_trainer(tmp_path, eval_dataset=pair_rows(), peft_config=LORA, **options)
    trainer.train()
    margins = [line["eval_margin"] for line in trainer.state.log_history if "eval_margin" in line]
    assert margins[-1] > min(margins)
    assert trainer.evaluate()["eval_margin"] == pytest.approx(min(margins), abs=1e-7)


# workflow: M9
def test_an_eight_bit_base_trains_its_adapter_and_head(tmp_path):
    from transformers import BitsAndBytesConfig

    pytest.importorskip("bitsandbytes")
    make_tiny_model().save_pretrained(tmp_path / "base")
    args = RewardConfig(output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, max_steps=2, disable_tqdm=True)
    trainer = RewardTrainer(
        str(tmp_path / "base"),
        args,
        train_dataset=POLITE,
        processing_class=make_byte_tokenizer(),
        peft_config=LORA,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
    )
    head = trainer.model.v_head.summary.weight.clone()
    assert np.isfinite(trainer.train().training_loss)
    assert not torch.equal(head, trainer.model.v_head.summary.weight)


# Scores -------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_predict_for_every_batch_size(tmp_path, byte_tokenizer):
    trainer = make_reward_trainer(tmp_path)
    chosen, rejected = trainer.predict(POLITE).predictions
    for side, expected in (("chosen", chosen), ("rejected", rejected)):
        turns = [[{"role": "user", "content": row["prompt"]}, said(row[side])] for row in POLITE]
        for size in (1, 3):
            found = score(trainer.model, byte_tokenizer, [{"messages": one} for one in turns], batch_size=size)
            np.testing.assert_allclose(found, expected, atol=1e-6)


def said(text):
    return {"role": "assistant", "content": text}


def test_a_conversation_without_an_answer_has_no_score(byte_tokenizer):
    with pytest.raises(DataError, match="example row 1: there is no answer to score"):
        score(RewardModel(make_tiny_model()), byte_tokenizer, [{"messages": [{"role": "user", "content": "?"}]}])


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True},
        {"tokens_per_batch": 64},
        {"label_smoothing_factor": 0.1},
        {"loss_type": "dft"},
        {"compile_layers": True},
        {"share_prefix": True},
        {"dataset_kwargs": {"format": "alpaca"}},
    ],
)
def test_options_that_nothing_acts_on_are_refused(tmp_path, options):
    with pytest.raises(ConfigError, match=f"nothing acts on {next(iter(options))}.* in stage rm"):
        make_reward_trainer(tmp_path, **options)


def test_an_unknown_loss_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="reward_loss: expected last_token or span, got 'mean'"):
        RewardConfig(output_dir=str(tmp_path), reward_loss="mean")


@pytest.mark.parametrize("prompt", ["Name a colour.", [{"role": "user", "content": "Name a colour."}], None])
def test_a_prompt_that_the_answers_begin_with_is_read_once(tmp_path, prompt):
    """As in ultrafeedback_binarized: whole conversations beside the prompt."""
    asked = {"role": "user", "content": "Name a colour."}
    both = ([asked, {"role": "assistant", "content": answer}] for answer in ("Blue.", "Go away."))
    row = {"prompt": prompt, **dict(zip(("chosen", "rejected"), both))}
    trainer = make_reward_trainer(tmp_path, rows=[row] * 2)
    text = trainer.tokenizer.decode(trainer.train_dataset[0]["chosen_input_ids"])
    assert text.count("Name a colour.") == 1
    assert text.count("Blue.") == 1


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (
            pair_rows().to_iterable_dataset(),
            ConfigError,
            "train_dataset is a stream, and stage rm needs all its pairs",
        ),
        ({"a": POLITE}, ConfigError, "train_dataset is a dict; expected a datasets.Dataset or a list of dicts"),
        ([{"prompt": "?", "chosen": "+"}], DataError, "train_dataset row 1: 'rejected' is missing"),
        ([{"prompt": "?", "chosen": "+", "rejected": "+"}], DataError, "nothing is left to train on"),
    ],
)
def test_rows_that_are_no_pairs_are_refused(tmp_path, rows, error, message):
    with pytest.raises(error, match=message):
        make_reward_trainer(tmp_path, rows=rows)


def test_token_rows_that_do_not_say_where_they_part_are_taken(tmp_path):
    rows = pair_rows().remove_columns(["first_difference", "index"])
    trainer = make_reward_trainer(tmp_path, rows=rows)
    assert trainer.train_dataset["first_difference"] == pair_rows()["first_difference"]


@pytest.mark.parametrize(
    ("ids", "message"),
    [([], "train_dataset row 2: chosen_input_ids are empty"), ([5, 4000], "train_dataset row 2: input_ids hold 4000")],
)
def test_token_rows_that_the_model_cannot_read_are_refused(tmp_path, ids, message):
    rows = [{"chosen_input_ids": one, "rejected_input_ids": [1, 2]} for one in ([3], ids)]
    with pytest.raises(DataError, match=message):
        make_reward_trainer(tmp_path, rows=rows)


def test_plain_arguments_are_taken_over(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=1, disable_tqdm=True)
    trainer = RewardTrainer(make_tiny_model(), args, train_dataset=POLITE, processing_class=make_byte_tokenizer())
    assert trainer.args.reward_loss == "last_token"
    assert trainer.train().training_loss > 0


# Two processes ------------------------------------------------------------------------------------------------------


def curve(folder: Path, ranks: int) -> dict:
    """What a run logs and scores; 7 pairs of a global batch of 4 leave uneven batches."""
    rows = pair_rows(LENGTHS[:7])
    options = {"per_device_train_batch_size": 4 // ranks, "per_device_eval_batch_size": 2, "num_train_epochs": 2}
    trainer = make_reward_trainer(folder, rows=rows, eval_dataset=pair_rows(LENGTHS[:5]), peft_config=LORA, **options)
    trainer.train()
    output = trainer.predict(pair_rows(LENGTHS[:5], seed=1))
    trainer.save_predictions(output)
    logged = [
        [line[key] for key in ("loss", "accuracy", "margin")] for line in trainer.state.log_history if "loss" in line
    ]
    found = trainer.evaluate()
    return {
        "logged": logged,
        "scored": [found[f"eval_{name}"] for name in ("loss", "accuracy", "margin")],
        "predicted": [values.tolist() for values in output.predictions],
    }


# workflow: W6
def test_two_processes_equal_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.train.test_reward", str(tmp_path)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    expected = curve(tmp_path / "one", ranks=1)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8"))
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-5, err_msg=name)
    written = [(tmp_path / folder / "generated_predictions.jsonl").read_text() for folder in ("one", "two")]
    assert written[0] == written[1]


def main(folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    found = curve(Path(folder) / "two", torch.distributed.get_world_size())
    (Path(folder) / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
