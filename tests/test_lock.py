"""One process writes a run directory."""

import multiprocessing
import os

import pytest

from tunesmith import lock
from tunesmith.errors import ConfigError
from tunesmith.lock import LOCK_FILE, locked


def hold(folder, ready, done):
    with locked(folder):
        ready.set()
        done.wait(30)


# reliability: 15
def test_a_second_process_is_told_who_writes_there(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path / "run", ready, done))
    other.start()
    assert ready.wait(30)
    with pytest.raises(ConfigError, match=f"is locked by process {other.pid}") as found, locked(tmp_path / "run"):
        pass
    assert found.value.exit_code == 2
    other.kill()
    other.join()
    with locked(tmp_path / "run"):  # the system has let it go
        assert (tmp_path / "run" / LOCK_FILE).read_text() == str(os.getpid())


def test_a_lock_that_was_let_go_while_it_was_opened_is_no_lock(tmp_path, monkeypatch):
    """The holder deletes its file after another process has opened it: that one must not lock what nobody can see."""
    take, times = lock._take, []

    def late(file, path):
        times.append(path)
        if len(times) == 1:
            (path / LOCK_FILE).unlink()
        take(file, path)

    monkeypatch.setattr(lock, "_take", late)
    with locked(tmp_path):
        assert len(times) == 2
        assert (tmp_path / LOCK_FILE).read_text() == str(os.getpid())
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_lock_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "new"):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with locked(tmp_path / "file"):  # whoever writes there says what is wrong
        pass
