"""Training as a process of its own: started detached, so that it needs no server, and stopped as Ctrl-C would.

Beside the run directory `runs/mine` lie `runs/mine.start.json` (what was started), `runs/mine.log` (what it said) and,
if its recipe was pasted, `runs/mine.yaml`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

from tunesmith.deliver.web.access import TOKEN_VARIABLE
from tunesmith.errors import ConfigError
from tunesmith.lookup import NO_CODE
from tunesmith.runs import read_status, to_json, write_text


@dataclass(frozen=True)
class Start:
    """A training process that was started from here."""

    SUFFIX: ClassVar[str] = ".start.json"

    pid: int
    host: str
    started: str
    output_dir: Path

    @property
    def log(self) -> Path:
        """What the process said."""
        return beside(self.output_dir, ".log")

    def is_newer_than(self, moment: Any) -> bool:
        """Whether the run's own times, its `started`, are of an earlier process."""
        return not isinstance(moment, str) or moment < self.started

    def is_alive(self) -> bool:
        """Whether the process is still there, and still ours."""
        return self.host == socket.gethostname() and is_training(self.pid)


def start_training(recipe: Path, output_dir: Path, *, may_import: bool = True) -> Start:
    """Start `tunesmith train` on the recipe.

    Args:
        recipe: a file that was checked.
        output_dir: where the recipe says the run goes; log and note are put beside it.
        may_import: whether the recipe may name code (`file.py:function`).

    Raises: ConfigError where a run there is being started or still going.
    """
    earlier = read_start(output_dir)
    if (earlier and earlier.is_alive()) or pid_of(output_dir) is not None:
        raise ConfigError(f"output_dir: {output_dir} holds a run that is still going. Stop it first.")
    log = beside(output_dir, ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tunesmith", "train", str(recipe.resolve())]
    variables = {key: value for key, value in os.environ.items() if key != TOKEN_VARIABLE}
    variables |= {} if may_import else {NO_CODE: "1"}
    started = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the server's terminal is not meant for it
            env={**variables, "PYTHONUNBUFFERED": "1"},
        )
    Thread(target=process.wait, daemon=True).start()  # else it would look alive when it has ended
    note = {"pid": process.pid, "host": socket.gethostname(), "started": started}
    write_text(beside(output_dir, Start.SUFFIX), to_json(note, indent=2) + "\n")
    return Start(**note, output_dir=output_dir)


def beside(output_dir: Path, suffix: str) -> Path:
    """The file that belongs to a run directory and lies next to it."""
    return output_dir.with_name(output_dir.name + suffix)


def read_start(output_dir: Path) -> Start | None:
    """The last start of a run from here, or None."""
    try:
        note = json.loads(beside(output_dir, Start.SUFFIX).read_bytes())
        return Start(int(note["pid"]), str(note["host"]), str(note["started"]), output_dir)
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def save_recipe(text: str, output_dir: Path) -> Path:
    """Keep a pasted recipe beside its run directory; an earlier one of other text is not replaced."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = beside(output_dir, ".yaml" if number == 1 else f"-{number}.yaml")
        if not path.exists():
            return write_text(path, text)
        if path.is_file() and path.read_bytes() == text.encode():
            return path
        number += 1


# ---------------------------------------------------------------------------------------------------- to stop one


def pid_of(output_dir: Path) -> int | None:
    """The process of a run that is going on this machine, by status.json or by its start, or None."""
    status, start = read_status(output_dir) or {}, read_start(output_dir)
    if start and start.is_newer_than(status.get("started")):
        return start.pid if start.is_alive() else None
    return _own_pid(status)


def _own_pid(status: Mapping[str, Any]) -> int | None:
    is_going = status.get("state") in ("preparing", "running") and status.get("host") == socket.gethostname()
    pid = status.get("pid")
    return pid if is_going and isinstance(pid, int) and is_training(pid) else None


def stop_training(output_dir: Path) -> int:
    """Send the run what Ctrl-C sends: it ends as `interrupted`. Returns: the process id.

    Raises: ConfigError where no process of tunesmith on this machine is at work there.
    """
    pid = pid_of(output_dir)
    if pid is None:
        raise ConfigError(
            f"{output_dir.name}: no `tunesmith train` of this machine is at work on it, so nothing was stopped. "
            "A run of another machine, or of a script, is stopped where it runs."
        )
    try:
        os.kill(pid, signal.SIGINT)
    except (ProcessLookupError, PermissionError) as error:
        raise ConfigError(f"{output_dir.name}: process {pid} cannot be stopped: {error.strerror}.") from error
    return pid


def is_training(pid: int) -> bool:
    """Whether the process is a `tunesmith train`: ids are used again, and a stale file must not end a stranger."""
    if pid <= 1:
        return False
    words = command_of(pid)
    return "train" in words and any(Path(word).name in ("tunesmith", "__main__.py") for word in words)


def command_of(pid: int) -> list[str]:
    """The words of the process's command line; none where it is gone."""
    try:
        return [word for word in Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0") if word]
    except OSError:
        pass
    if Path("/proc/self").exists():
        return []
    try:  # no /proc: macOS
        said = subprocess.run(["ps", "-p", str(pid), "-o", "command="], capture_output=True, text=True, check=False)
    except OSError:
        return []
    return said.stdout.split()
