"""One process writes a run directory."""

import multiprocessing
import os

import pytest

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


def test_a_lock_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "new"):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with locked(tmp_path / "file"):  # whoever writes there says what is wrong
        pass
