"""Numbers that are none, memory that runs out, signals, hangs, full disks: the run stops or goes on, and says so."""

import errno
import json
import logging
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.faults.runs import in_child, log_of, make_run, outcome, start_child, train
from tests.faults.steps import AtStep, SignalInStep
from tests.workplace import write_rows
from tunesmith import signals
from tunesmith.checkpoints import checkpoints, damage
from tunesmith.cli import app
from tunesmith.errors import CheckpointError, DataError, MemoryLimitError, NonFiniteError
from tunesmith.train.step import TokenTrainer

ALONE = {
    "gradient_accumulation_steps": 1,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "logging_steps": 1,
}


# Numbers -----------------------------------------------------------------------------------------------------------


def poison(trainer, steps, how="loss"):
    """Make the loss or a gradient of some steps infinite or not a number."""
    original, passes = TokenTrainer._one_pass, []

    def one_pass(self, model, inputs, count):
        loss = original(self, model, inputs, count)
        passes.append(self.state.global_step + 1)
        if passes[-1] in steps:
            if how == "gradient":
                next(model.parameters()).grad[0, 0] = float("inf")
            else:
                return loss * float("nan")
        return loss

    trainer._one_pass = one_pass.__get__(trainer)


# reliability: 28
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_number_that_is_none_stops_before_the_update(tmp_path, how):
    whole = make_run(tmp_path / "a", **ALONE, max_steps=2)
    whole.train()
    trainer = make_run(tmp_path / "b", **ALONE)
    poison(trainer, {3}, how)
    with pytest.raises(
        NonFiniteError, match=r"step 3: loss .*Its rows are 4, 5 of train_dataset.*after step 2"
    ) as found:
        trainer.train()
    assert found.value.exit_code == 6
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name])
    assert all(line["loss"] > 0 for line in trainer.state.log_history)


# reliability: 29
def test_steps_are_skipped_within_a_budget(tmp_path, caplog):
    trainer = make_run(tmp_path / "a", **ALONE, on_nonfinite="skip", max_skipped_steps=2)
    poison(trainer, {2, 4})
    before = {}
    trainer.add_callback(
        AtStep(1, lambda: before.update({k: v.clone() for k, v in trainer.model.state_dict().items()}))
    )
    after = {}
    trainer.add_callback(
        AtStep(2, lambda: after.update({k: v.clone() for k, v in trainer.model.state_dict().items()}))
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert all(torch.equal(before[name], after[name]) for name in before), "a skipped step changed a weight"
    assert trainer.skipped_steps == 2
    assert "step 2: loss nan" in caplog.text
    lines = [line for line in trainer.state.log_history if "grad_norm" in line]
    assert [line["step"] for line in lines if "loss" not in line] == [2, 4]
    assert all(line["loss"] > 0 for line in lines if "loss" in line)
    trainer = make_run(tmp_path / "b", **ALONE, on_nonfinite="skip", max_skipped_steps=2)
    poison(trainer, {2, 4, 5})
    with pytest.raises(NonFiniteError, match="2 steps were skipped before"):
        trainer.train()


# reliability: 30
def test_a_loss_that_explodes_is_told_once(tmp_path, caplog):
    trainer = make_run(tmp_path, **ALONE, num_train_epochs=4, save_strategy="no", learning_rate=1e-4)
    original = trainer._one_pass
    trainer._one_pass = lambda *args: original(*args) * (100 if trainer.state.global_step >= 8 else 1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert len([line for line in caplog.messages if "times its median" in line]) == 1
    assert "step 11: the loss has been over 10 times" in caplog.text


# Memory ------------------------------------------------------------------------------------------------------------


def out_of_memory_above(trainer, rows, after=0):
    """Let forward passes of more than so many rows fail, halfway through the backward pass, from a step on."""
    original = TokenTrainer._one_pass

    def one_pass(self, model, inputs, count):
        if len(inputs["rows"].rows) > rows and self.state.global_step >= after:
            original(self, model, inputs, count)  # leaves gradients behind
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, model, inputs, count)

    trainer._one_pass = one_pass.__get__(trainer)


# reliability: 31
@pytest.mark.parametrize("accumulate", [1, 2])
def test_out_of_memory_halves_the_rows_at_once_and_changes_no_step(tmp_path, caplog, accumulate):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulate, "logging_steps": 1}
    whole = make_run(tmp_path / "a", **options, rows=(9, 4, 14, 6) * 4)
    whole.train()
    trainer = make_run(tmp_path / "b", **options, rows=(9, 4, 14, 6) * 4)
    out_of_memory_above(trainer, 2, after=1)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.rows_at_once == 2
    assert len([line for line in caplog.messages if "out of memory" in line]) == 1
    assert trainer.tokens_seen == whole.tokens_seen
    for one, other in zip(outcome(whole)["logs"], outcome(trainer)["logs"], strict=True):
        for name in one.keys() & {"loss", "grad_norm", "mean_token_accuracy", "num_tokens", "train_loss"}:
            assert other[name] == pytest.approx(one[name], rel=1e-5), name


# reliability: 31
def test_out_of_memory_with_one_row_says_which_is_longest(tmp_path):
    trainer = make_run(tmp_path, **ALONE)
    out_of_memory_above(trainer, 0)
    with pytest.raises(
        MemoryLimitError, match=r"step 1: out of memory .* of one row; the longest has \d+ tokens"
    ) as found:
        trainer.train()
    assert found.value.exit_code == 5


# Signals -----------------------------------------------------------------------------------------------------------


def signalled(folder, number, times=1, **options):
    """Train, and be sent a signal between the micro-batches of step 2."""
    return train(folder, callbacks=[SignalInStep(2, number, times)], **options)


SAVED = {"model": {"attention_dropout": 0.1}, "save_steps": 100}


# reliability: 23 25
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_a_signal_saves_at_the_end_of_the_step_and_stops(tmp_path, number, code):
    whole, told = tmp_path / "whole.json", tmp_path / "cut.json"
    assert in_child(whole, train, tmp_path / "whole", **SAVED) == 0, log_of(whole)
    assert in_child(told, signalled, tmp_path / "cut", number, **SAVED) == code, log_of(told)
    assert list(checkpoints(tmp_path / "cut")) == [2]
    assert damage(tmp_path / "cut" / "checkpoint-2") is None
    assert "Traceback" not in log_of(told)
    assert f"{number.name}: stopping after this step" in log_of(told)
    again = tmp_path / "again.json"
    assert in_child(again, train, tmp_path / "cut", True, **SAVED) == 0, log_of(again)
    assert json.loads(again.read_text()) == json.loads(whole.read_text())


# reliability: 25
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)], ids=["raises", "ends"]
)
def test_a_second_signal_stops_at_once(tmp_path, number, code):
    told = tmp_path / "told.json"
    assert in_child(told, signalled, tmp_path / "run", number, 2, **SAVED) == code
    assert "Traceback" not in log_of(told)
    assert not checkpoints(tmp_path / "run")


def command(folder):
    """The same in a process that is all ours, as the command line's is."""
    with signals.heeded(is_own_process=True):
        return signalled(folder, signal.SIGINT, 2, **SAVED)


# reliability: 25
def test_a_second_ctrl_c_ends_a_command_without_a_traceback(tmp_path):
    told = tmp_path / "told.json"
    assert in_child(told, command, tmp_path / "run") == -signal.SIGINT
    assert "Traceback" not in log_of(told)


def evaluated(folder, sent, **options):
    """Train with an evaluation after step 2 that takes for ever, unless a signal ends it."""
    trainer = make_run(folder, held_out=(5, 7), eval_strategy="steps", eval_steps=2, **options)
    if sent:
        original = trainer._sum

        def endless(dataloader):
            original(dataloader)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

        trainer._sum = endless
    trainer.train(resume_from_checkpoint=True if checkpoints(folder) else None)
    return outcome(trainer)


# reliability: 24
def test_a_signal_during_evaluation_ends_it_and_the_evaluation_is_made_up_for(tmp_path):
    whole, cut, again = (tmp_path / f"{name}.json" for name in ("whole", "cut", "again"))
    assert in_child(whole, evaluated, tmp_path / "whole", False, **SAVED) == 0, log_of(whole)
    begin = time.monotonic()
    assert in_child(cut, evaluated, tmp_path / "cut", True, **SAVED) == 143, log_of(cut)
    assert time.monotonic() - begin < 30
    assert list(checkpoints(tmp_path / "cut")) == [2]
    assert in_child(again, evaluated, tmp_path / "cut", False, **SAVED) == 0, log_of(again)
    assert json.loads(again.read_text()) == json.loads(whole.read_text())


# Silence -----------------------------------------------------------------------------------------------------------


def hangs(folder):
    """Train with a step that never ends."""
    train(folder, callbacks=[AtStep(2, lambda: time.sleep(60))], hang_timeout=0.5)


# reliability: 27
def test_a_run_that_hangs_is_ended_with_its_stacks_on_file(tmp_path):
    begin = time.monotonic()
    assert in_child(tmp_path / "told.json", hangs, tmp_path / "run") == 1
    assert time.monotonic() - begin < 30
    assert "test_guards.py" in (tmp_path / "run" / "stacks-0.txt").read_text()
    assert "no step ended for" in log_of(tmp_path / "told.json")


class DyingRows(torch.utils.data.Dataset):
    """Rows whose reader is killed at the sixth."""

    def __init__(self, rows):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index == 6 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.rows[index]


# reliability: 26
def test_a_reader_that_is_killed_is_an_error_and_no_hang(tmp_path):
    trainer = make_run(tmp_path, dataset=DyingRows, dataloader_num_workers=1, **ALONE)
    with pytest.raises(
        DataError, match=r"a process that reads rows is gone: DataLoader worker \(pid.*dataloader_num_w"
    ):
        trainer.train()


# Disks -------------------------------------------------------------------------------------------------------------


def on_a_full_disk(folder, policy):
    """Train while no file may be larger than half of what a checkpoint needs, from step 2 on."""

    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    return train(folder, callbacks=[AtStep(2, fill)], on_save_failure=policy)


# reliability: 20
def test_a_full_disk_leaves_earlier_checkpoints_and_says_what_is_needed(tmp_path):
    told = tmp_path / "told.json"
    assert in_child(told, on_a_full_disk, tmp_path / "stops", "stop") == CheckpointError.exit_code, log_of(told)
    assert [entry.name for entry in (tmp_path / "stops").iterdir()] == ["checkpoint-1"]
    assert damage(tmp_path / "stops" / "checkpoint-1") is None
    said = log_of(told)
    assert "checkpoint-2 could not be written to" in said
    assert "A checkpoint takes 0.00 GB" in said
    assert "GB are free" in said
    assert in_child(tmp_path / "on.json", on_a_full_disk, tmp_path / "goes on", "continue") == 0
    assert [entry.name for entry in (tmp_path / "goes on").iterdir()] == ["checkpoint-1"]
    assert "Training goes on" in log_of(tmp_path / "on.json")


# reliability: 20
@pytest.mark.parametrize("is_all_full", [False, True])
def test_a_trained_model_that_finds_no_room_is_kept_elsewhere(tmp_path, monkeypatch, is_all_full):
    (tmp_path / "refuge").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "refuge"))
    trainer = make_run(tmp_path / "run", save_strategy="no", max_steps=1)
    trainer.train()
    save = trainer._save

    def full(output_dir=None, **kwargs):
        if is_all_full or Path(output_dir or tmp_path / "run") == tmp_path / "run":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(output_dir, **kwargs)

    monkeypatch.setattr(trainer, "_save", full)
    with pytest.raises(CheckpointError, match=r"could not be written to .*run: No space left on device") as found:
        trainer.save_trained()
    kept = list((tmp_path / "refuge").iterdir())
    assert len(kept) == (0 if is_all_full else 1)
    assert ("a run goes on from its checkpoints" if is_all_full else f"It lies in {kept[0]}.") in str(found.value)
    assert is_all_full or (kept[0] / "model.safetensors").is_file()


# reliability: 20
def test_a_save_is_not_begun_where_there_is_no_room(tmp_path, monkeypatch):
    trainer = make_run(tmp_path)
    monkeypatch.setattr("tunesmith.train.checkpoint.shutil.disk_usage", lambda path: type("", (), {"free": 10})())
    with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written .*No space left on device"):
        trainer.train()
    assert list(checkpoints(tmp_path)) == [1]


def waits(folder):
    """A run that waits for a signal in its third step."""
    return train(folder, callbacks=[AtStep(2, lambda: (folder / "here").touch() or time.sleep(3))], **SAVED)


# reliability: 23
def test_a_signal_from_outside_is_heard_in_a_step(tmp_path):
    child = start_child(tmp_path / "told.json", waits, tmp_path / "run")
    while not (tmp_path / "run" / "here").exists():
        time.sleep(0.05)
        assert child.exitcode is None, log_of(tmp_path / "told.json")
    os.kill(child.pid, signal.SIGTERM)
    child.join()
    assert child.exitcode == 143
    assert list(checkpoints(tmp_path / "run")) in ([2], [3])


def prepares(folder):
    """A command whose rows take half a minute to tokenize."""
    os.chdir(folder)
    app(["train", "recipe.yaml", "--output_dir", "out"], prog_name="tunesmith")


# reliability: 24
def test_a_signal_while_rows_are_tokenized_ends_the_command_within_seconds(workplace, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(workplace / "cache"))
    write_rows(workplace / "train.jsonl", [("what? " * 200, f"{number}") for number in range(60_000)])
    child = start_child(workplace / "told.json", prepares, workplace)
    while not (workplace / "out" / "status.json").exists():
        time.sleep(0.05)
        assert child.exitcode is None, log_of(workplace / "told.json")
    time.sleep(2)
    begin = time.monotonic()
    os.kill(child.pid, signal.SIGTERM)
    child.join(30)
    assert child.exitcode == 143, log_of(workplace / "told.json")
    assert time.monotonic() - begin < 5
    assert json.loads((workplace / "out" / "status.json").read_text())["state"] == "interrupted"
    assert "Interrupted by SIGTERM." in log_of(workplace / "told.json")
    assert not list((workplace / "cache").rglob("*.arrow")), "half of the tokens were kept"
