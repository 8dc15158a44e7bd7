"""What a checkpoint was trained with is held against the run that goes on from it; damage is never trained on."""

import json
import shutil

import datasets
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.faults.runs import RandomCollator, make_run
from tests.train.rows import token_rows
from tunesmith import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer, workflow
from tunesmith.checkpoints import checkpoints, seal
from tunesmith.errors import CheckpointError, ConfigError
from tunesmith.train.contract import table_digest

FOUR = {"max_steps": 4, "save_steps": 2, "save_total_limit": None, "logging_steps": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("contract") / "run"
    make_run(folder, **FOUR).train()
    return folder


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("contract") / "lora"
    make_run(folder, **FOUR, lora={"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}).train()
    return folder


def go_on(run, tmp_path, **options):
    """Go on from checkpoint 2 with other options."""
    trainer = make_run(tmp_path / "again", **{**FOUR, **options})
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    return trainer


DIFFERENT = {
    "data": (
        {"rows": (9, 4, 14, 6, 11, 5, 8, 17, 3, 13)},
        r"data\.hash: [0-9a-f]{32} in the checkpoint, [0-9a-f]{32}",
    ),
    "fewer rows": ({"rows": (9, 4, 14, 6, 11, 5, 8, 17)}, r"data\.rows: 10 in the checkpoint, 8 now"),
    "order of rows": ({"dataset": lambda rows: rows.select(range(9, -1, -1))}, r"data\.hash"),
    "seed": ({"seed": 5}, r"seed\.seed: 3 in the checkpoint, 5 now"),
    "learning rate": ({"learning_rate": 1e-3}, r"learning_rate: 0\.01 in the checkpoint, 0\.001 now"),
    "batch": ({"gradient_accumulation_steps": 4}, "rows_per_step: 4 in the checkpoint, 8 now"),
    "schedule": ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type: linear in the checkpoint, cosine now"),
    "weight decay": ({"weight_decay": 0.1}, r"weight_decay: 0\.0 in the checkpoint, 0\.1 now"),
    "shorter": ({"max_steps": 3}, "max_steps: 4 in the checkpoint, 3 now"),
    "precision": ({"bf16": True}, "precision: float32 in the checkpoint, bfloat16 now"),
    "loss": ({"loss_type": "dft"}, "loss_type: nll in the checkpoint, dft now"),
    "padding": ({"ignore_pad_token_for_loss": False}, "ignore_pad_token_for_loss: True in the checkpoint, False now"),
    "positions": (
        {"model": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}},
        r"model\.positions: .*'default'.* in the checkpoint, .*'linear'.* now",
    ),
    "LoRA+": ({"loraplus_lr_ratio": 4.0}, r"loraplus_lr_ratio: None in the checkpoint, 4\.0 now"),
    "plateau": (
        {"lr_scheduler_type": "reduce_lr_on_plateau", "held_out": (5, 7), "eval_strategy": "steps", "eval_steps": 2},
        r"reduce_lr_on_plateau: None in the checkpoint, \[0\.01, None\] now",
    ),
    "optimizer's own": ({"optim_args": "eps=1e-7"}, "optim_args: None in the checkpoint, eps=1e-7 now"),
}


# reliability: 9 10 11
@pytest.mark.parametrize("name", DIFFERENT)
def test_a_run_that_differs_is_refused_with_old_and_new_value(run, tmp_path, name):
    options, words = DIFFERENT[name]
    with pytest.raises(CheckpointError, match=words) as found:
        go_on(run, tmp_path, **options)
    assert found.value.exit_code == 4
    assert not (tmp_path / "again").exists() or not checkpoints(tmp_path / "again")


# reliability: 9
def test_another_tokenizer_template_or_adapter_is_refused(run, lora_run, tmp_path, monkeypatch):
    trainer = make_run(tmp_path, **FOUR)
    trainer.tokenizer.chat_template += " "
    with pytest.raises(CheckpointError, match=r"chat_template: [0-9a-f]{32} in the checkpoint"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    trainer = make_run(tmp_path, **FOUR)
    trainer.tokenizer.add_tokens(["wholly new"])
    with pytest.raises(CheckpointError, match=r"tokenizer: [0-9a-f]{32} in the checkpoint"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    with pytest.raises(CheckpointError, match=r"adapter\.r: 4 in the checkpoint, 8 now"):
        go_on(lora_run, tmp_path, lora={"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"})
    dropped = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.5}
    with pytest.raises(CheckpointError, match=r"adapter\.lora_dropout: 0\.0 in the checkpoint, 0\.5 now"):
        go_on(lora_run, tmp_path, lora=dropped)
    with pytest.raises(CheckpointError, match=r"adapter: .* now"):
        go_on(lora_run, tmp_path)


# reliability: 9
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_an_adapter_goes_on_upon_the_base_it_was_trained_on_alone(tmp_path, stage):
    tiny.make_tiny_model().save_pretrained(tmp_path / "model")
    run = adapter_run(tmp_path, stage)
    run.train()
    with pytest.raises(CheckpointError, match=r"adapter\.lora_alpha: 8 in the checkpoint, 16 now"):
        adapter_run(tmp_path, stage, lora_alpha=16).train(resume_from_checkpoint=True)
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.input_layernorm.weight"] += 0.01
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"base: [0-9a-f]{16} in the checkpoint, [0-9a-f]{16} now"):
        adapter_run(tmp_path, stage).train(resume_from_checkpoint=True)


# reliability: 9
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"load_in_4bit": True}, r"model\.quantization: None in the checkpoint, .*'load_in_4bit': True.* now"),
        ({"dtype": "bfloat16"}, r"weights: float32 \(49\) in the checkpoint, bfloat16 \(21\), float32 \(28\) now"),
    ],
)
def test_a_base_in_other_bits_is_another_base(tmp_path, given, words):
    if "load_in_4bit" in given:
        pytest.importorskip("bitsandbytes", reason="needs the extra quant")
    tiny.make_tiny_model().save_pretrained(tmp_path / "model")
    adapter_run(tmp_path, "sft").train()
    with pytest.raises(CheckpointError, match=words):
        adapter_run(tmp_path, "sft", model_init_kwargs=given).train(resume_from_checkpoint=True)


# reliability: 9
@pytest.mark.parametrize(
    "changed",
    [{"metric_for_best_model": "eval_mean_token_accuracy", "greater_is_better": True}, {"held_out": (5, 6, 7)}],
    ids=["metric", "rows"],
)
def test_another_measure_of_the_best_looks_for_it_anew(tmp_path, changed):
    options = {"held_out": (5, 7), "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss"}
    make_run(tmp_path / "run", **FOUR, **options).train()
    trainer = go_on(tmp_path / "run", tmp_path, **{**options, **changed})
    assert any("the best checkpoint is looked for anew" in line for line in trainer.accepted_changes)
    measure = changed.get("metric_for_best_model", "eval_loss")
    assert trainer.state.best_metric == [line[measure] for line in trainer.state.log_history if measure in line][-1]
    assert trainer.state.best_global_step == 4


def adapter_run(folder, stage, lora_alpha=8, **options):
    """Two steps of an adapter on `model`, as a person's Python would write them."""
    trainer, config = {"sft": (SFTTrainer, SFTConfig), "rm": (RewardTrainer, RewardConfig)}[stage]
    pairs = [{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(6)]
    return trainer(
        str(folder / "model"),
        config(str(folder / "run"), max_steps=2, save_steps=1, bf16=False, use_cpu=True, disable_tqdm=True, **options),
        train_dataset=token_rows() if stage == "sft" else pairs,
        processing_class=tiny.make_byte_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


# reliability: 9
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.sum()}, "compute_loss_func"),
        ({"data_collator": RandomCollator()}, "data_collator: None in the checkpoint, RandomCollator now"),
    ],
)
def test_a_loss_or_batches_of_ones_own_are_none_of_a_run_without(run, tmp_path, given, words):
    trainer = make_run(tmp_path, **FOUR)
    for name, value in given.items():
        setattr(trainer, name, value)
    trainer._own_batches = "data_collator" not in given
    with pytest.raises(CheckpointError, match=words):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))


# reliability: 10
def test_an_allowed_learning_rate_is_the_one_that_is_used_and_is_recorded(run, tmp_path):
    again = go_on(run, tmp_path, learning_rate=1e-3, resume_allow=["learning_rate"])
    rates = [line["learning_rate"] for line in again.state.log_history if "learning_rate" in line]
    assert rates[:2] == pytest.approx([1e-2, 0.75e-2]), "of the steps before"
    assert rates[2:] == pytest.approx([0.5e-3, 0.25e-3]), "of the new rate, where the schedule is by now"
    state = json.loads((tmp_path / "again" / "checkpoint-4" / "run_state.json").read_text())
    assert state["terms"]["learning_rate"] == 1e-3
    assert "learning_rate: 0.01 in the checkpoint, 0.001 now" in state["accepted"][0]


def test_other_allowed_settings_are_used(run, tmp_path):
    again = go_on(
        run, tmp_path, weight_decay=0.5, lr_scheduler_type="constant", resume_allow=["optimizer", "schedule"]
    )
    assert again.optimizer.param_groups[0]["weight_decay"] == 0.5
    rates = [line["learning_rate"] for line in again.state.log_history if "learning_rate" in line]
    assert rates[2:] == pytest.approx([1e-2, 1e-2])


# reliability: 12
def test_a_longer_run_goes_on_under_the_schedule_of_the_new_length(run, tmp_path):
    again = go_on(run, tmp_path, max_steps=8)
    rates = [line["learning_rate"] for line in again.state.log_history if "learning_rate" in line]
    assert rates[2:] == pytest.approx([1e-2 * (1 - step / 8) for step in (2, 3, 4, 5, 6, 7)])
    assert "max_steps: 4 in the checkpoint, 8 now" in again.accepted_changes[0]


def test_what_may_not_differ_cannot_be_allowed(run, tmp_path):
    with pytest.raises(ConfigError, match=r"resume_allow: 'learnin_rate' is nothing .* Did you mean 'learning_rate'"):
        go_on(run, tmp_path, resume_allow=["learnin_rate"])
    with pytest.raises(ConfigError, match="resume_allow: 'seed' is nothing that may differ"):
        go_on(run, tmp_path, resume_allow=["seed"], seed=5)


def resealed(run, tmp_path, change):
    """A copy of checkpoint 2 that somebody changed on purpose."""
    import shutil

    copy = tmp_path / "checkpoint-2"
    shutil.copytree(run / "checkpoint-2", copy)
    change(copy)
    (copy / "manifest.json").unlink()
    seal(copy, step=2)
    return copy


def rewrite(copy, change):
    path = next(copy.glob("*model.safetensors"))
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


TENSORS = {
    "missing": (lambda found: found.pop(sorted(found)[0]), "is missing"),
    "strange": (lambda found: found.update({"layers.9.extra": torch.ones(2)}), "layers.9.extra is not in the model"),
    "shape": (lambda found: found.update({sorted(found)[0]: torch.ones(3)}), r"has shape \(3,\) in place of"),
}


# reliability: 8
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", TENSORS)
def test_weights_of_another_model_are_named(run, lora_run, tmp_path, name, kind):
    change, words = TENSORS[name]
    source = run if kind == "full" else lora_run
    copy = resealed(source, tmp_path, lambda folder: rewrite(folder, change))
    options = {} if kind == "full" else {"lora": {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}}
    trainer = make_run(tmp_path / "again", **FOUR, **options)
    with pytest.raises(CheckpointError, match=words):
        trainer.train(resume_from_checkpoint=str(copy))


# reliability: 8
def test_tied_heads_are_not_missed(tmp_path, caplog):
    tied = {"model": {"tie_word_embeddings": True}}
    make_run(tmp_path / "run", **FOUR, **tied).train()
    assert "lm_head.weight" not in load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    caplog.clear()
    make_run(tmp_path / "again", **FOUR, **tied).train(str(tmp_path / "run" / "checkpoint-2"))
    assert "missing" not in caplog.text


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_nothing_that_training_needs_may_be_missing(run, tmp_path, name):
    copy = resealed(run, tmp_path, lambda folder: (folder / name).unlink())
    with pytest.raises(CheckpointError, match=f"holds no {name}"):
        make_run(tmp_path / "again", **FOUR).train(str(copy))


# reliability: 7
def test_where_all_are_damaged_each_is_named_and_none_deleted(run, tmp_path):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-2" / "optimizer.pt").unlink()
    (tmp_path / "run" / "checkpoint-4" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as found:
        make_run(tmp_path / "run", **FOUR).train(resume_from_checkpoint=True)
    assert "checkpoint-4 is skipped: model.safetensors has 0 bytes" in str(found.value)
    assert "checkpoint-2 is skipped: optimizer.pt is missing" in str(found.value)
    assert list(checkpoints(tmp_path / "run")) == [2, 4]


def test_a_table_is_known_by_what_is_in_it():
    rows = token_rows()
    parts = datasets.concatenate_datasets([rows.select(range(3)), rows.select(range(3, len(rows)))])
    assert table_digest(rows) == table_digest(parts) == table_digest(rows.select(range(len(rows))))
    assert table_digest(rows) != table_digest(rows.select([1, 0, *range(2, len(rows))]))
    joined = datasets.Dataset.from_list([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}])
    split = datasets.Dataset.from_list([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])
    assert table_digest(joined) != table_digest(split)


# reliability: 19
def test_a_checkpoint_holds_no_pickled_arguments_and_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_plantedplanted1234")
    make_run(tmp_path, **FOUR, hub_token="hf_plantedplanted1234").train()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja", ".pt", ".pth", ".txt"}
    assert not [path.name for path in files if path.name.endswith(".bin")]
    assert not [path.name for path in files if b"plantedplanted" in path.read_bytes()]
    for path in files:
        if path.suffix in (".pt", ".pth") and path.name != "rng_state.pth":
            torch.load(path, weights_only=True)


def test_a_checkpoint_of_an_earlier_version_does_not_tell_every_term(run, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(run, folder)
    path = folder / "checkpoint-2" / "run_state.json"
    state = json.loads(path.read_text())
    del state["terms"]["loss"]["reward_loss"]
    path.write_text(json.dumps(state))
    seal(folder / "checkpoint-2")
    assert go_on(folder, tmp_path).state.global_step == 4


# streams -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """The options of a streamed run of four steps, and its folder."""
    folder = tmp_path_factory.mktemp("streamed")
    tiny.make_tiny_model().save_pretrained(folder / "base")
    tiny.make_byte_tokenizer().save_pretrained(folder / "base")
    for name in ("a", "b"):
        rows = (f'{{"prompt": "{name} {number}?", "completion": "answer {number}"}}\n' for number in range(20))
        (folder / f"{name}.jsonl").write_text("".join(rows))
    options = {
        "model_name_or_path": str(folder / "base"), "dataset": [str(folder / "a.jsonl"), str(folder / "b.jsonl")],
        "streaming": True, "mix_strategy": "interleave_over", "buffer_size": 8, "max_steps": 4, "save_steps": 2,
        "per_device_train_batch_size": 2, "bf16": False, "use_cpu": True, "plot_loss": False, "adapter": "full",
    }  # fmt: skip
    workflow.run({**options, "output_dir": str(folder / "run")})
    return options, folder / "run"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train_on": "all"}, r"data\.train_on: assistant in the checkpoint, all now"),
        ({"packing": True}, r"data\.packing: False in the checkpoint, True now"),
        ({"interleave_probs": [0.9, 0.1]}, r"data\.interleave_probs: None in the checkpoint, \[0\.9, 0\.1\] now"),
        ({"system_prompt": "Be rude."}, r"data\.system_prompt: None in the checkpoint, Be rude\. now"),
        ({"buffer_size": 4}, r"data\.buffer_size: 8 in the checkpoint, 4 now"),
        ({}, None),
    ],
)
def test_a_stream_is_gone_on_from_with_the_same_options_of_data(streamed, tmp_path, changed, said):
    options, run = streamed
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(run / "checkpoint-2", checkpoint)
    options = {**options, **changed, "output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(checkpoint)}
    if said is None:
        assert workflow.run(options)["train_loss"] > 0
        return
    with pytest.raises(CheckpointError, match=said):
        workflow.run(options)
