"""Resumed equals uninterrupted, bit for bit, at every step, whatever is drawn by chance."""

import shutil

import pytest

from tests.faults.runs import KINDS, make_run, outcome, train
from tunesmith.checkpoints import checkpoints

ALL = {"save_total_limit": None}


@pytest.fixture
def uninterrupted(tmp_path, outcome_of):
    """The outcome of a run that saves every step."""
    return lambda folder=tmp_path, **options: outcome_of(train, folder / "whole", **{**ALL, **options})


@pytest.fixture
def resumed(tmp_path, outcome_of):
    """The outcome of a run that goes on from a step of that one."""

    def run(step, **options):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        return outcome_of(train, tmp_path / "again", checkpoint, **{**ALL, **options})

    return run


# reliability: 1 2
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_equals_uninterrupted_at_every_step(tmp_path, kind, request, uninterrupted, resumed):
    whole = uninterrupted(**KINDS[kind])
    steps = list(checkpoints(tmp_path / "whole"))
    assert len(steps) >= 4
    few = {"dropout": steps, "random collator, workers": [2]}.get(kind, steps[1:-1:2])
    for step in steps if request.config.getoption("--all-faults") else few:
        again = resumed(step, **KINDS[kind])
        assert again["logs"] == whole["logs"], f"logged after step {step}"
        assert again["hash"] == whole["hash"], f"resumed after step {step}"
        shutil.rmtree(tmp_path / "again")


# reliability: 2
def test_a_mean_that_was_half_summed_is_logged_as_in_one_go(uninterrupted, resumed):
    options = {"logging_steps": 4, "model": KINDS["dropout"]["model"]}
    whole = uninterrupted(**options)
    again = resumed(3, **options)
    assert again["logs"] == whole["logs"]
    assert whole["logs"][-1]["train_loss"] > 0


# reliability: 11
def test_the_same_step_in_other_micro_batches_goes_on_alike(uninterrupted, resumed):
    whole = uninterrupted()
    again = resumed(2, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    for one, other in zip(whole["logs"], again["logs"], strict=True):
        assert other.get("loss") == pytest.approx(one.get("loss"), abs=1e-6)


# reliability: 32
def test_a_seed_repeats_and_another_does_not(tmp_path, uninterrupted):
    first, second = (uninterrupted(tmp_path / name, model=KINDS["dropout"]["model"]) for name in ("a", "b"))
    other = uninterrupted(tmp_path / "c", model=KINDS["dropout"]["model"], seed=4)
    assert first == second
    assert other["hash"] != first["hash"]


BEST = {"held_out": (5, 7), "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}


def moved(folder, checkpoint):
    """A resumed run, and which checkpoint it takes for the best."""
    trainer = make_run(folder, **BEST, save_total_limit=2)
    trainer.train(resume_from_checkpoint=checkpoint)
    return {**outcome(trainer), "best": trainer.state.best_model_checkpoint, "step": trainer.state.best_global_step}


# reliability: 13 18
def test_a_run_that_was_moved_goes_on_and_keeps_its_best_checkpoint(tmp_path, uninterrupted, outcome_of):
    whole = uninterrupted(**BEST)
    shutil.move(tmp_path / "whole", tmp_path / "moved")
    found = outcome_of(moved, tmp_path / "moved", str(tmp_path / "moved" / "checkpoint-4"))
    assert (found["hash"], found["logs"]) == (whole["hash"], whole["logs"])
    assert found["best"] == str(tmp_path / "moved" / f"checkpoint-{found['step']}")
    assert (tmp_path / "moved" / f"checkpoint-{found['step']}").is_dir()
