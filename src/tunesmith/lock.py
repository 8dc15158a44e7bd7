"""One process writes a run directory: a lock of the system's, which goes with the process however it ends."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows; a run's status still tells whether it is going
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the folder inside; it is made if it is not there, and gone again if nothing was put into it.

    Raises: ConfigError where another process holds it.
    """
    path, made = Path(folder).expanduser(), False
    try:
        made = not path.exists()
        file = _taken(path)
    except OSError:  # whoever writes there first says what is wrong with it
        yield
        return
    with file:
        try:
            yield
        finally:
            (path / LOCK_FILE).unlink(missing_ok=True)
            if made and not any(path.iterdir()):
                path.rmdir()


def _taken(path: Path) -> Any:
    """The lock's file, held. Its last holder deleted it, perhaps after it was opened here: then another is made."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        file = open(path / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 - held until the end
        try:
            _take(file, path)
            if fcntl is None or os.path.samestat(os.fstat(file.fileno()), os.stat(path / LOCK_FILE)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def _take(file: Any, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        raise ConfigError(
            f"output_dir: {path} is locked by process {holder}, which is writing a run there. Stop it first or choose "
            "another --output_dir."
        ) from None
    except OSError:  # a file system without locks
        return
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
