"""Runs that are killed or interrupted through the command line: the same command again ends as if nothing had been."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.killed_runs import CASES, KILLED
from tests.small_runs import read_figures, read_rows
from tunesmith.runs import read_metrics, read_status

ROOT = Path(__file__).parents[1]
WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "value_head.safetensors")
SPEED = ("runtime", "per_second", "mfu")
RUNS = {**{name: (f"whole/{name}", f"cut/{name}") for name in KILLED}, "interrupted": ("whole/lora", "interrupted"),
        "after training": ("whole/lora", "after")}  # fmt: skip
OF_LORA = ("lora", "interrupted", "after training")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where everything of `tests.killed_runs` has been run."""
    found = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "tests.killed_runs", str(found)]
    run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    return found


def codes(folder: Path, name: str) -> list[int]:
    return json.loads((folder / f"{name}.codes.json").read_text())


def figures(rows: list[dict]) -> list[dict]:
    """Logged figures, without those of a session: of the clock, and of the line at its end."""
    return [
        {key: value for key, value in row.items() if not key.endswith(SPEED)}
        for row in rows
        if "train_loss" not in row
    ]


def test_killed_runs_are_killed_and_the_same_command_goes_on(folder):
    assert {name: codes(folder, name) for name in CASES} == {
        **{name: [0, -9, 0] for name in KILLED},
        "interrupted": [130, 0, 2, 0],
        "after": [-9, 0],
    }


# workflow: W1 V11
@pytest.mark.parametrize("run", RUNS)
def test_the_weights_are_those_of_the_uninterrupted_run_bit_for_bit(folder, run):
    whole, cut = (folder / name for name in RUNS[run])
    found = [name for name in WEIGHTS if (whole / name).is_file()]
    assert found
    for name in found:
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


# workflow: W1 V11
@pytest.mark.parametrize("run", RUNS)
def test_each_step_is_logged_once_with_the_same_figures(folder, run):
    whole, cut = (figures(read_metrics(folder / name)) for name in RUNS[run])
    assert cut == whole
    losses = [row["step"] for row in cut if "loss" in row]
    assert losses == list(range(1, len(losses) + 1))


# workflow: W5
@pytest.mark.parametrize("run", RUNS)
def test_the_trainer_log_rises_and_says_no_loss_twice(folder, run):
    rows = read_rows(folder / RUNS[run][1] / "trainer_log.jsonl")
    steps = [row["current_steps"] for row in rows]
    assert steps == sorted(steps)
    losses = [row["current_steps"] for row in rows if "loss" in row]
    assert losses == list(range(1, losses[-1] + 1))


# workflow: W1
@pytest.mark.parametrize("run", RUNS)
def test_results_are_those_of_the_whole_run(folder, run):
    for file in ("train_results.json", "eval_results.json", "all_results.json"):
        whole, cut = (read_figures(folder / name / file) for name in RUNS[run])
        step = cut.pop("train_resumed_at_step", None)
        begun = {"after training": 7, "interrupted": 6}.get(run, 3)
        assert step == (None if file.startswith("eval") else begun)
        assert cut == pytest.approx(whole, rel=1e-12)


# workflow: W2
@pytest.mark.parametrize("run", OF_LORA)
def test_the_loss_curve_is_drawn_from_all_steps(folder, run):
    """`plot_curves` gets the log of the trainer's state."""
    whole, cut = (folder / name for name in RUNS[run])
    logs = [json.loads((path / "trainer_state.json").read_text())["log_history"] for path in (whole, cut)]
    losses = [[(row["step"], row["loss"]) for row in log if "loss" in row] for log in logs]
    assert losses[1] == losses[0]
    assert (cut / "training_loss.png").stat().st_mtime > (cut / "checkpoint-3").stat().st_mtime


@pytest.mark.parametrize("run", OF_LORA)
@pytest.mark.parametrize("when", ["predictions_before", "predictions_after", "generated_predictions", "samples"])
def test_answers_are_those_of_the_uninterrupted_run(folder, run, when):
    """Those before training too: they are the untrained model's, not of the one that training goes on with."""
    whole, cut = (folder / name / f"{when}.jsonl" for name in RUNS[run])
    assert cut.read_bytes() == whole.read_bytes()


def test_ctrl_c_is_said_in_the_folder_with_the_step_it_came_at(folder):
    status = json.loads((folder / "interrupted.json").read_text())
    assert (status["state"], status["reason"], status["step"]) == ("interrupted", "Ctrl-C", 6)
    assert read_status(folder / "interrupted")["state"] == "completed"


# workflow: V11
def test_a_finished_run_is_left_as_it_is(folder):
    """Started again it is refused; with `resume_from_checkpoint: true` it says that nothing is left to do."""
    output = (folder / "output.txt").read_text()
    assert "interrupted holds another run (completed, step 7 of 7" in output
    assert "interrupted is complete: checkpoint-7 is after its last step. Nothing was done." in output
    assert json.loads((folder / "untouched.json").read_text())


def test_the_report_of_a_stream_counts_what_was_read(folder):
    whole, cut = (json.loads((folder / name / "data_report.json").read_text())["train"] for name in RUNS["stream"])
    assert cut == whole
    assert whole["rows"] == {"read": 25, "kept": 25, "dropped": 0}


def test_the_saved_recipe_does_not_ask_for_a_checkpoint(folder):
    assert "resume_from_checkpoint" not in (folder / "interrupted" / "recipe.yaml").read_text()
