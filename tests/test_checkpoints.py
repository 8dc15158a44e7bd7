"""Checkpoint folders: sealed, found by verifying, deleted by rename, leftovers removed."""

import os

import pytest

from tunesmith.checkpoints import checkpoints, clean, damage, delete, last_whole, publish, retain, seal, staged


def save(run, step, **files):
    """A published checkpoint with these files."""
    folder = staged(run, step)
    folder.mkdir(parents=True)
    for name, text in {"weights": "one two three four", "state": f"{step}", **files}.items():
        (folder / name).write_text(text)
    seal(folder, step=step)
    return publish(folder, run)


def test_a_published_checkpoint_is_whole_and_leaves_nothing_beside_it(tmp_path):
    path = save(tmp_path, 3)
    assert path == tmp_path / "checkpoint-3"
    assert damage(path) is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-3"]


def test_the_same_step_saved_again_takes_the_place_of_the_first(tmp_path):
    save(tmp_path, 3)
    save(tmp_path, 3, state="anew")
    assert (tmp_path / "checkpoint-3" / "state").read_text() == "anew"
    assert damage(tmp_path / "checkpoint-3") is None


DAMAGES = {
    "missing": (lambda path: path.unlink(), "weights is missing"),
    "cut to 60 %": (lambda path: path.write_text(path.read_text()[:10]), "weights has 10 bytes in place of 18"),
    "emptied": (lambda path: path.write_text(""), "weights has 0 bytes in place of 18"),
    "one bit": (lambda path: path.write_bytes(b"onf" + path.read_bytes()[3:]), "weights has changed since"),
}


# reliability: 6
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_for_a_reason(tmp_path, kind):
    change, reason = DAMAGES[kind]
    good, bad = save(tmp_path, 9), save(tmp_path, 10)
    change(bad / "weights")
    found = last_whole(tmp_path)
    assert found.path == good
    assert len(found.skipped) == 1
    assert found.skipped[0].startswith("checkpoint-10 is skipped: ")
    assert reason in found.skipped[0]


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"files": 3}', '{"format": 99, "files": {}}'])
def test_without_a_manifest_that_can_be_read_it_is_no_checkpoint(tmp_path, text):
    path = save(tmp_path, 10)
    (path / "manifest.json").unlink()
    if text is not None:
        (path / "manifest.json").write_text(text)
    assert "manifest.json" in damage(path)
    assert last_whole(tmp_path).path is None


# reliability: 13
def test_the_oldest_go_by_step_and_the_best_stays(tmp_path):
    for step in (2, 4, 10, 8, 6):
        os.utime(save(tmp_path, step), (step * -1000 % 7000, 0))
    retain(tmp_path, 3, keep={4})
    assert list(checkpoints(tmp_path)) == [4, 8, 10]
    retain(tmp_path, 1)
    assert list(checkpoints(tmp_path)) == [8, 10], "two are kept at least"
    retain(tmp_path, None)
    assert list(checkpoints(tmp_path)) == [8, 10]


# reliability: 13
def test_what_an_earlier_run_left_behind_goes_first(tmp_path):
    for step in (2, 4, 18, 20):
        save(tmp_path, step)
    retain(tmp_path, 3, keep={4}, newest=4)
    assert list(checkpoints(tmp_path)) == [2, 4, 20]
    retain(tmp_path, 2, keep={4}, newest=4)
    assert list(checkpoints(tmp_path)) == [2, 4]


# reliability: 14
def test_leftovers_are_never_read_and_are_removed(tmp_path):
    save(tmp_path, 3)
    staged(tmp_path, 4).mkdir(parents=True)
    (staged(tmp_path, 4) / "weights").write_text("half")
    (tmp_path / ".trash-checkpoint-1").mkdir()
    (tmp_path / ".trash-checkpoint-1" / "manifest.json").write_text("{}")
    assert list(checkpoints(tmp_path)) == [3]
    assert clean(tmp_path) == [".tmp-checkpoint-4", ".trash-checkpoint-1"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-3"]
    assert clean(tmp_path / "nowhere") == []


def test_a_deletion_that_was_cut_short_can_be_repeated(tmp_path):
    path = save(tmp_path, 3)
    (tmp_path / ".trash-checkpoint-3").mkdir()
    delete(path)
    assert not list(tmp_path.iterdir())
