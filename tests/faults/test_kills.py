"""Killed at any write of a save: what is visible verifies, and the same command again ends as if nothing had been."""

import json
import random
import signal

import pytest

from tests.faults.killer import Killer
from tests.faults.runs import in_child, log_of, start_child, train
from tests.faults.steps import ArmAtStep
from tunesmith.checkpoints import STAGED, checkpoints, damage, last_whole

SAVED = {"model": {"attention_dropout": 0.1}, "save_total_limit": 2}
ARMED = 3  # the save that is watched: there are two checkpoints before it, so one is deleted
STRIDE = 7  # of the default suite; `make faults` kills at every write
MOMENTS = 6


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Outcome of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("expected")
    assert in_child(folder / "told.json", train, folder / "run", **SAVED) == 0, log_of(folder / "told.json")
    return json.loads((folder / "told.json").read_text())


def killed_at(folder, at, options=SAVED):
    """Train until the `at`-th write of the watched save; the writes that were seen, if it was never reached."""
    killer = Killer(folder, at)
    train(folder, callbacks=[ArmAtStep(killer, ARMED)], **options)
    return killer.seen


def all_writes(tmp_path, options=SAVED):
    """The writes of one save."""
    told = tmp_path / "seen.json"
    assert in_child(told, killed_at, tmp_path / "seen", None, options) == 0, log_of(told)
    return json.loads(told.read_text())


def check_survival(folder, expected, told):
    """Every visible checkpoint verifies, and the run goes on to the expected end."""
    assert checkpoints(folder), "no checkpoint is left"
    for path in checkpoints(folder).values():
        assert damage(path) is None, path
    assert in_child(told, train, folder, True, **SAVED) == 0, log_of(told)
    assert json.loads(told.read_text()) == expected
    assert not [entry.name for entry in folder.iterdir() if entry.name.startswith((STAGED, ".trash-"))]


# reliability: 4 14
def test_killed_at_any_write_of_a_save(tmp_path, expected, request, record_property):
    writes = all_writes(tmp_path)
    assert len(writes) >= 12, writes
    assert {
        "half of optimizer.pt",
        "half of model.safetensors",
        "os.rename checkpoint-3",
        "os.rename checkpoint-1",
    } <= {*writes}
    moments = range(1, len(writes) + 1, 1 if request.config.getoption("--all-faults") else STRIDE)
    record_property("tried", len(moments))
    for at in moments:
        folder = tmp_path / f"run-{at}"
        told = tmp_path / f"told-{at}.json"
        assert in_child(told, killed_at, folder, at) == -signal.SIGKILL, writes[at - 1]
        check_survival(folder, expected, told)


# reliability: 3 5
def test_killed_at_random_moments(tmp_path, expected, request, record_property):
    kills, folder, draws = 0, tmp_path / "run-0", random.Random(0)
    wanted = request.config.getoption("--kills") or MOMENTS
    runs = unusable = 0
    while kills < wanted:
        resume = True if folder.is_dir() and checkpoints(folder) else None
        told = tmp_path / f"told-{runs}.json"
        child = start_child(told, train, folder, resume, **SAVED)
        done = wait_or_kill(child, draws.uniform(0.1, 0.9))
        if done is None:
            kills += 1
            if folder.is_dir() and checkpoints(folder):
                unusable += last_whole(folder).skipped != []
            continue
        assert done == 0, log_of(told)
        assert json.loads(told.read_text()) == expected
        runs, folder = runs + 1, tmp_path / f"run-{runs + 1}"
    record_property("tried", kills)
    record_property("lost", unusable)
    print(f"{kills} kills, {runs} runs that ended as the uninterrupted one, {unusable} unusable checkpoints")
    assert unusable == 0


def wait_or_kill(child, seconds):
    """Exit code of a process that ends within so many seconds; `None` if it had to be killed."""
    child.join(seconds)
    if child.exitcode is None:
        child.kill()
        child.join()
    return None if child.exitcode == -signal.SIGKILL else child.exitcode
