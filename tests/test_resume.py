"""Where a run begins: no folder is touched unless it is said, and a run that was cut short goes on."""

import os

import pytest

from tunesmith.checkpoints import seal
from tunesmith.errors import CheckpointError, ConfigError
from tunesmith.resume import begin
from tunesmith.runs import Run


def a_run(folder, state, steps=()):
    folder.mkdir()
    Run(folder).write_status(state)
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        seal(folder / f"checkpoint-{step}", step=step)
    return folder


def start(folder, overwrite=False, resume=None):
    return begin(folder, overwrite=overwrite, resume_from_checkpoint=resume)


# workflow: V11
@pytest.mark.parametrize("state", ["failed", "interrupted"])
def test_a_run_that_was_cut_short_goes_on_from_its_highest_step(tmp_path, state):
    folder = a_run(tmp_path / "run", state, steps=(9, 10, 2))
    os.utime(folder / "checkpoint-2", (2e9, 2e9))
    (folder / "checkpoint-11").mkdir()  # killed before its state was written
    found = start(folder)
    assert found.checkpoint == folder / "checkpoint-10"
    assert found.skipped[0].startswith("checkpoint-11 is skipped: no manifest.json")


# workflow: V11
def test_a_folder_that_is_no_run_to_go_on_with_is_an_error(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("words")
    with pytest.raises(ConfigError, match=r"mine is not empty \(thesis\.tex\)"):
        start(tmp_path / "mine")
    failed = a_run(tmp_path / "failed", "failed")
    (failed / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ConfigError, match=r"holds another run \(failed\).*--overwrite_output_dir"):
        start(failed)


@pytest.mark.parametrize("state", ["failed", "interrupted"])
def test_a_run_that_failed_before_it_trained_begins_anew(tmp_path, state):
    folder = a_run(tmp_path / "run", state)
    for name in ("recipe.yaml", "events.jsonl", "data_report.json"):
        (folder / name).write_text("")
    assert start(folder) == (folder, None, ())
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["thesis.tex", "adapter_model.safetensors", "predictions_before.jsonl"])
def test_a_failed_run_with_anything_else_in_it_is_left_alone(tmp_path, name):
    folder = a_run(tmp_path / "run", "failed")
    (folder / name).write_text("words")
    with pytest.raises(ConfigError, match="holds another run"):
        start(folder)
    assert (folder / name).is_file()


def test_a_finished_run_is_not_gone_on_with_unless_it_is_said(tmp_path):
    folder = a_run(tmp_path / "run", "completed", steps=(3,))
    with pytest.raises(ConfigError, match=r"holds another run \(completed, 1 checkpoint, the last at step 3\)"):
        start(folder)
    assert start(folder, resume="true").checkpoint == folder / "checkpoint-3"


def test_overwriting_and_false_begin_anew(tmp_path):
    found = start(a_run(tmp_path / "one", "failed", steps=(3,)), overwrite=True)
    held = f"{tmp_path / 'one'} holds another run (failed, 1 checkpoint, the last at step 3), which is deleted"
    assert (found.checkpoint, found.skipped) == (None, (f"overwrite_output_dir: {held}",))
    assert not list((tmp_path / "one").iterdir())
    with pytest.raises(ConfigError, match="holds another run"):
        start(a_run(tmp_path / "two", "failed", steps=(3,)), resume=False)


def test_a_checkpoint_that_was_asked_for_must_be_there(tmp_path):
    with pytest.raises(CheckpointError, match="new holds no checkpoint to go on from"):
        start(tmp_path / "new", resume=True)
    with pytest.raises(CheckpointError, match=r"away holds no trainer_state\.json"):
        start(tmp_path / "new", resume=str(tmp_path / "away"))


def test_a_checkpoint_of_another_run_begins_in_a_new_folder(tmp_path):
    checkpoint = a_run(tmp_path / "run", "completed", steps=(3,)) / "checkpoint-3"
    assert start(tmp_path / "again", resume=str(checkpoint)) == (tmp_path / "again", checkpoint, ())


def test_a_run_that_another_process_writes_is_left_alone(tmp_path):
    folder = a_run(tmp_path / "run", "running", steps=(3,))
    status = folder / "status.json"
    status.write_text(status.read_text().replace(f'"pid": {os.getpid()}', f'"pid": {os.getppid()}'))
    with pytest.raises(ConfigError, match="holds a run that is still going"):
        start(folder, resume=True)
