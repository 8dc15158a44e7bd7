"""Runs recipes in processes that are killed: `python -m tests.killed_runs FOLDER`, see `test_workflow_resume`.

Each run is a fork of a process that has imported everything and run nothing, so it starts in no time and shares no
state with the others. Two lanes of them go side by side.
"""

import contextlib
import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401 - imported once for all runs, as what follows
import peft  # noqa: F401

from tests.small_runs import RECIPES, make_workplace
from tunesmith import workflow  # noqa: F401
from tunesmith.cli import app
from tunesmith.train.callbacks import RunLogCallback

KILLED = ("lora", "full", "packed", "stream", "pt", "rm")
MIDDLE = (5, "loss")  # what is logged last: the loss of step 5; the last checkpoint is that of step 3
AFTER = (7, "train_loss")  # training is over, and nothing was saved but the last checkpoint
Log = tuple[int, str]


def command(*words: str, sent: int | None = None, at: Log = MIDDLE) -> int:
    """Run a command in a process of its own, which sends itself a signal once something is logged.

    Returns: the exit code; the negative number of the signal that ended it.
    """
    return in_child(lambda: run_command(words, sent, at))


def in_child(function: Callable[[], int]) -> int:
    if not (child := os.fork()):
        code = 99
        try:
            code = function()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_command(words: tuple[str, ...], sent: int | None, at: Log) -> int:
    with open("output.txt", "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        print("$", *words, flush=True)
        if sent is not None:
            send_at(at, sent)
        try:
            app(list(words), prog_name="tunesmith")
        except SystemExit as done:
            file.flush()
            return int(done.code or 0)
    return 99


def send_at(at: Log, number: int) -> None:
    log = RunLogCallback.on_log

    def log_and_die(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        log(self, args, state, control, logs, **kwargs)
        if state.global_step == at[0] and at[1] in logs:
            os.kill(os.getpid(), number)

    RunLogCallback.on_log = log_and_die


def killed_and_again(name: str) -> list[int]:
    """Exit codes of the uninterrupted run, of the one that is killed, and of the same command again."""
    whole, cut = (("train", f"{name}.yaml", "--output_dir", f"{folder}/{name}") for folder in ("whole", "cut"))
    return [command(*whole), command(*cut, sent=signal.SIGKILL), command(*cut)]


def interrupted() -> list[int]:
    """Ctrl-C, and the same command again; then once more, and with `resume_from_checkpoint`."""
    words = ("train", "lora.yaml", "--output_dir", "interrupted")
    codes = [command(*words, sent=signal.SIGINT)]
    Path("interrupted.json").write_text(Path("interrupted/status.json").read_text())
    codes.append(command(*words))
    before = contents("interrupted")
    codes += [command(*words), command(*words, "--resume_from_checkpoint", "true")]
    Path("untouched.json").write_text(json.dumps(before == contents("interrupted")))
    return codes


def after_training() -> list[int]:
    """Killed when only the model was still to be saved and evaluated."""
    words = ("train", "lora.yaml", "--output_dir", "after")
    return [command(*words, sent=signal.SIGKILL, at=AFTER), command(*words)]


def contents(folder: str) -> dict[str, Any]:
    """Bytes and time of each file."""
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


CASES = {**{name: lambda name=name: killed_and_again(name) for name in KILLED},
         "interrupted": interrupted, "after": after_training}  # fmt: skip
assert RECIPES.keys() >= set(KILLED)


def lane(names: list[str]) -> int:
    for name in names:
        Path(f"{name}.codes.json").write_text(json.dumps(CASES[name]()))
    return 0


def main(folder: str, names: list[str]) -> None:
    os.chdir(make_workplace(Path(folder)))
    gc.freeze()  # else each run collects what all have in common
    if not (other := os.fork()):
        os._exit(lane(names[1::2]))
    lane(names[::2])
    os.waitpid(other, 0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] or list(CASES))
