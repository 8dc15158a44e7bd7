"""What `tunesmith check` says of memory, and the line at the start of a run."""

import json
import re

import pytest
from typer.testing import CliRunner

from tests.workplace import call
from tunesmith.cli import app

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "libraries", "allocator")


def memory_told(*words) -> dict:
    result = CliRunner().invoke(app, ["check", "recipe.yaml", "--json", *words])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["memory"]


def test_check_tells_the_memory_of_a_step_beside_what_is_there(workplace):
    said = call("check", "recipe.yaml")
    table = said[said.index("memory at the peak of a step") :]
    assert "tokens in the largest micro-batch, float32 products, no checkpointing" in table
    assert re.search(r"\n  libraries +\S+ [GM]B\n", table)
    assert re.search(r"\n  total +\S+ GB of \S+ GB that this machine has for it\n", table)


def test_the_json_has_every_part_in_bytes(workplace):
    found = memory_told("--gradient_accumulation_steps", "2")
    assert found["total"] == pytest.approx(sum(found[part] for part in PARTS), abs=10)
    assert (found["products"], found["gradient_checkpointing"]) == ("float32", False)
    assert 0 < found["trained_tokens"] < found["tokens"]


def test_options_that_help_are_named_where_it_does_not_fit(workplace, monkeypatch):
    monkeypatch.setattr("tunesmith.steps.memory.usable_bytes", lambda device: 1e5)
    monkeypatch.setattr("tunesmith.train.memory.IMPORTED", 0.0)
    monkeypatch.setattr("tunesmith.train.memory.resident_bytes", lambda: 0.0)
    words = ("--adapter", "full", "--gradient_checkpointing", "false", "--per_device_train_batch_size")
    helps = [memory_told(*words, rows)["helps"].keys() for rows in ("16", "1")]
    assert {"per_device_train_batch_size: 1", "gradient_checkpointing: true"} <= helps[0]
    assert any(name.startswith("adapter: lora") for name in helps[1])
    assert "memory: it does not fit. Each of these helps: per_device" in call("check", "recipe.yaml", *words, "16")


def test_checkpointing_is_chosen_where_activations_would_not_fit(workplace, monkeypatch):
    monkeypatch.setattr("tunesmith.train.choose.usable_bytes", lambda device: 1e6)
    monkeypatch.setattr("tunesmith.allocator.save_memory", lambda: True)  # it would stay so for the tests after this
    assert memory_told()["gradient_checkpointing"]


def test_a_model_whose_config_cannot_be_had_is_left_out_with_the_reason(workplace, monkeypatch):
    def missing(*args, **options):
        raise OSError("no connection\nat all")

    monkeypatch.setattr("tunesmith.model.sketch.load_config", missing)
    assert memory_told() == {"reason": "OSError: no connection"}
    assert "memory: not estimated (OSError: no connection)" in call("check", "recipe.yaml")


def test_a_recipe_that_trains_nothing_has_no_memory(workplace):
    assert memory_told("--do_train", "false", "--do_eval", "true") is None


def test_a_run_says_in_one_line_what_it_chose_and_keeps_every_line(workplace):
    said = call("train", "recipe.yaml")
    chosen = [line for line in said.splitlines() if line.startswith("chose: ")]
    assert len(chosen) == 1
    assert re.fullmatch(
        r"chose: float32 products \(bfloat16 is \S+ × as fast as float32 here\) · 4 rows, at most \d+ tokens a "
        r"micro-batch · no checkpointing \(\S+ of \S+ GB\) · attention per document, no padding · a "
        r"common beginning once",
        chosen[0],
    )
    assert "gradient checkpointing:" not in said
    events = (workplace / "run" / "events.jsonl").read_text()
    assert "gradient checkpointing: off" in events
    assert chosen[0].split(" · ")[-1] in events


def test_a_run_tells_its_utilization(workplace):
    said = call("train", "recipe.yaml")
    assert re.search(r"tokens/s, MFU \S+ % of a measured \S+ [GT]FLOP/s", said)
    figures = json.loads((workplace / "run" / "train_results.json").read_text())
    assert figures["train_mfu"] == pytest.approx(
        figures["train_flops_per_second"] / figures["peak_flops_per_second"], abs=1e-4
    )


# reliability: 21
def test_check_tells_whether_two_checkpoints_fit_on_the_disk(workplace, monkeypatch):
    said = call("check", "recipe.yaml")
    assert re.search(r"\ndisk: a checkpoint takes about \S+ [GM]B, and \S+ GB are free\n", said)
    assert "do not fit" not in said
    found = memory_told()
    assert found["checkpoint"] == found["gradients"] + found["optimizer"]
    monkeypatch.setattr("tunesmith.steps.memory.free_disk", lambda folder: found["checkpoint"] * 1.5)
    assert "disk: 2 checkpoints do not fit, the last and the one being written. Make room" in call(
        "check", "recipe.yaml"
    )
