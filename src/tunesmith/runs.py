"""The run directory is the database: status, metrics, events and the resolved recipe are files, written as it happens.

    recipe.yaml     the resolved recipe; running it again repeats the run
    status.json     where the run stands, replaced whole (see `Run.write_status`)
    metrics.jsonl   one line per log of the trainer
    events.jsonl    one line per thing worth telling
    data_report.json                       what became of every row
    train_results.json, eval_..., predict_..., all_results.json      figures of each phase, and of all
    generated_predictions.jsonl            answers; predictions_before.jsonl and ..._after.jsonl, samples.jsonl
    trainer_log.jsonl, training_loss.png   the log with times, and the curves

Whole files are staged, synced and renamed, so a reader never sees half of one; lines are appended and flushed. Secrets
are never written (`redact`). Nothing here imports torch: `tunesmith status` and the studio read with it.
"""

import json
import math
import os
import re
import shutil
import socket
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import yaml

from tunesmith.checkpoints import checkpoints
from tunesmith.errors import ConfigError
from tunesmith.lock import LOCK_FILE

State = Literal["preparing", "running", "completed", "failed", "interrupted"]

STATUS_FILE = "status.json"
METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
ALL_RESULTS_FILE = "all_results.json"
TRAINER_LOG_FILE = "trainer_log.jsonl"
DATA_REPORT_FILE = "data_report.json"
PREDICTIONS_FILE = "generated_predictions.jsonl"
COMPARED_FILES = {when: f"predictions_{when}.jsonl" for when in ("before", "after")}
SAMPLES_FILE = "samples.jsonl"
RECIPE_FILE = "recipe.yaml"
# What a run has written when its training begins.
BEFORE_TRAINING = {
    *(STATUS_FILE, EVENTS_FILE, RECIPE_FILE, "crash.txt", DATA_REPORT_FILE, "training_args.json"),
    "finetuning_args.json",
}
RECIPE_HEADER = "# Written by tunesmith: every option of this run as it was resolved.\n"


# ---------------------------------------------------------------------------------------------------- the folder


def prepare_output_dir(path: str | Path, overwrite: bool) -> Path:
    """An existing, writable and empty folder for a run; nothing is touched unless it returns.

    Args:
        path: the run directory, created with its parents.
        overwrite: delete the run that the folder holds; one that failed before it trained anything goes without it.
            Only a folder that tunesmith wrote is deleted, never the one the program was started in, and never a run
            that is still going.

    Raises: ConfigError if the path is a file, cannot be written, or holds anything that may not be deleted.
    """
    path = Path(path).expanduser()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output_dir: {path} is a file. Name a folder with --output_dir.")
    try:
        found = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK_FILE) if path.is_dir() else []
        if found:
            _refuse_to_replace(path, found, overwrite)
        _make_writable_folder(path)
        _empty(path)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"output_dir: cannot write to {path}: {reason}. Choose another --output_dir.") from error
    return path


def _refuse_to_replace(path: Path, found: list[str], overwrite: bool) -> None:
    """Raise unless `path`, which is not empty, may be emptied."""
    what = _describe(path, found)
    is_run = _is_run(path)
    if not overwrite and is_run and _trained_nothing(path, found):
        return
    if not overwrite:
        if is_run:
            resume = " continue it with --resume_from_checkpoint true," if "checkpoint" in what else ""
            fix = f"Replace it with --overwrite_output_dir,{resume} or choose another --output_dir."
        else:
            fix = "Choose another --output_dir."
        raise ConfigError(f"output_dir: {path} {what}. {fix}")
    if not is_run:
        raise ConfigError(
            f"output_dir: {path} {what}, and no {STATUS_FILE} or {RECIPE_FILE} written by tunesmith, so "
            "--overwrite_output_dir does not delete it. Choose another --output_dir or empty the folder yourself."
        )
    here = Path.cwd().resolve()
    if path.resolve() == here or path.resolve() in here.parents or ".git" in found:
        raise ConfigError(
            f"output_dir: {path} is the folder you work in, so --overwrite_output_dir does not delete it. "
            "Choose another --output_dir."
        )
    refuse_if_going(path)


def refuse_if_going(path: Path) -> None:
    """Raise ConfigError where another process is still writing the run in `path`."""
    status = read_status(path) or {}
    is_going = status.get("state") in ("preparing", "running") and status.get("pid") != os.getpid()
    if is_going and _process_exists(status):
        raise ConfigError(
            f"output_dir: {path} holds a run that is still going (process {status['pid']}). "
            "Stop it first or choose another --output_dir."
        )


def _describe(path: Path, found: list[str]) -> str:
    """What a person should know about a folder that is in the way."""
    if not _is_run(path):
        shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        return f"is not empty ({shown})"
    status = read_status(path) or {}
    parts = [str(status["state"])] if status.get("state") else []
    if status.get("step") is not None:
        parts.append(f"step {status['step']} of {status.get('total_steps', '?')}")
    if steps := list(checkpoints(path)):
        parts.append(f"{len(steps)} checkpoint{'s' if len(steps) > 1 else ''}, the last at step {steps[-1]}")
    return "holds another run" + (f" ({', '.join(parts)})" if parts else "")


def what_is_in(path: Path) -> str:
    """What a person should know of the run in a folder; nothing where there is none."""
    return _describe(path, []) if _is_run(path) else ""


def _is_run(path: Path) -> bool:
    """True if tunesmith wrote here. A `recipe.yaml` alone is not enough: people name their own recipes so."""
    if "state" in (_read_json(path / STATUS_FILE) or {}):
        return True
    try:
        with open(path / RECIPE_FILE, encoding="utf-8") as file:
            return file.readline() == RECIPE_HEADER
    except (OSError, UnicodeDecodeError):
        return False


def _trained_nothing(path: Path, found: list[str]) -> bool:
    """Whether a run failed before its training began, over its data perhaps: there is nothing to lose in it."""
    state = (read_status(path) or {}).get("state")
    return state in ("failed", "interrupted") and BEFORE_TRAINING.issuperset(found)


def shared_output_dir(path: str | Path) -> Path:
    """A writable folder for figures beside whatever it holds; made if there is none. Raises: ConfigError if not."""
    path = Path(path).expanduser()
    try:
        _make_writable_folder(path)
    except OSError as error:
        reason = "it is a file" if path.is_file() else error.strerror or error
        raise ConfigError(f"output_dir: cannot write to {path}: {reason}. Choose another --output_dir.") from error
    return path


def _make_writable_folder(path: Path) -> None:
    probe = path / f".write-test-{os.getpid()}"
    path.mkdir(parents=True, exist_ok=True)
    probe.touch()  # os.access says yes to root, read-only mounts included
    probe.unlink()


def _empty(path: Path) -> None:
    """Delete what is in the folder, what marks it as a run last: a deletion cut short can be repeated."""
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name in (STATUS_FILE, RECIPE_FILE)):
        if entry.name == LOCK_FILE:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


# ---------------------------------------------------------------------------------------------------- writing


class Run:
    """Writes the files of one run. One process writes; in a distributed run that is rank 0.

    Args:
        path: a folder from `prepare_output_dir`, or one that holds a run to be continued.
        writes: false on every rank but the first, whose calls then do nothing.
    """

    def __init__(self, path: str | Path, writes: bool = True) -> None:
        self.path = Path(path)
        self.writes = writes
        self._status: dict[str, Any] = {
            "state": "preparing",
            "reason": None,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": _now(),
        }

    def write_status(self, state: State, reason: str | None = None, **figures: Any) -> None:
        """Replace status.json. Figures stay until they are given again: step, total_steps, loss, eta_seconds, ..."""
        self.note(**figures)
        self._status |= {"state": state, "reason": reason, "updated": _now()}
        if state not in ("preparing", "running"):
            self._status.pop("eta_seconds", None)
        self.save_json(STATUS_FILE, self._status)

    def note(self, **figures: Any) -> None:
        """Remember figures for the next status."""
        self._status |= figures

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl. Times are left out, so that a repeated run can be compared by its loss."""
        if self.writes:
            append_line(self.path / METRICS_FILE, metrics)

    def event(self, kind: str, message: str) -> None:
        """Append one line to events.jsonl, e.g. `event("warning", "3 rows are longer than max_length")`."""
        if self.writes:
            append_line(self.path / EVENTS_FILE, {"time": _now(), "kind": kind, "message": message})

    def save_json(self, name: str, value: Any) -> Path:
        """Write `name` whole; a crash leaves the old file or the new one."""
        return self._write(name, to_json(value, indent=2) + "\n")

    def save_results(self, phase: str, figures: Mapping[str, Any]) -> None:
        """Write the figures of a phase (train, eval, predict), and add them to those of the phases before.

        train_results.json, eval_results.json, predict_results.json     one phase each
        all_results.json                                                 all of them
        """
        self.save_json(f"{phase}_results.json", figures)
        self.save_json(ALL_RESULTS_FILE, self.results() | dict(figures))

    def results(self) -> dict[str, Any]:
        """The figures of all phases so far."""
        return _read_json(self.path / ALL_RESULTS_FILE) or {}

    def forget_results(self) -> None:
        """Begin anew: figures of a run that stopped here before are not this run's."""
        if self.writes:
            (self.path / ALL_RESULTS_FILE).unlink(missing_ok=True)

    def save_recipe(self, options: Mapping[str, Any]) -> Path:
        """Write the resolved recipe in the order given, as `recipe.yaml`."""
        body = yaml.safe_dump(as_saved(options), sort_keys=False, allow_unicode=True, width=119)
        return self._write(RECIPE_FILE, RECIPE_HEADER + body)

    def _write(self, name: str, text: str) -> Path:
        return write_text(self.path / name, text) if self.writes else self.path / name


def as_saved(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as `recipe.yaml` holds them."""
    return redact(_plain(options))


def write_text(path: Path, text: str) -> Path:
    """Write a whole file: staged beside it, synced, renamed."""
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(staged, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    return path


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line and flush. A line that a crash cut short stays alone on its line."""
    with open(path, "ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        else:
            torn = False
        file.write((b"\n" if torn else b"") + to_json(value).encode() + b"\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON without secrets; NaN and infinity, which JSON lacks, become the strings `nan`, `inf`, `-inf`."""
    return json.dumps(redact(_plain(value)), ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    """The same value out of dicts, lists, strings, numbers, booleans and None."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # UTF-8 has no lone surrogates
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {name.name: _plain(getattr(value, name.name)) for name in fields(value)}
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a number of numpy or torch
        return _plain(value.item())
    if getattr(value, "ndim", 0) and hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# ---------------------------------------------------------------------------------------------------- secrets

REDACTED = "<redacted>"
_SECRET_KEY = re.compile(r"(^|[_-])(token|key|password|passwd|secret|authorization)$", re.IGNORECASE)
_TEXT_TOKEN = re.compile(r"^(pad|eos|bos|unk|sep|cls|mask|stop|image|audio|video)_token$", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}|gh[opusr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"  # user:password@ of a URL
)


def redact(value: Any) -> Any:
    """The same plain value with texts under a secret's name, and texts that look like a secret, replaced.

    Files and folders may be named alike, and a recipe must find them again: tokens are longer, and no words.

    >>> redact({"hub_token": "abc", "eos_token": "</s>", "note": "use hf_abcdefghijklmnopqrst"})
    {'hub_token': '<redacted>', 'eos_token': '</s>', 'note': 'use <redacted>'}
    >>> redact("data/sk-translations.jsonl, data/hf_datasets.jsonl")
    'data/sk-translations.jsonl, data/hf_datasets.jsonl'
    """
    if isinstance(value, Mapping):
        return {key: REDACTED if _is_secret(key, item) else redact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redact(item) for item in value]
    return _SECRET_VALUE.sub(REDACTED, value) if isinstance(value, str) else value


def _is_secret(key: Any, value: Any) -> bool:
    """Numbers are never secrets: `loss_per_token` is a figure. Nor is the text of a tokenizer's control token."""
    name = str(key)
    return isinstance(value, str) and bool(_SECRET_KEY.search(name)) and not _TEXT_TOKEN.match(name)


# ---------------------------------------------------------------------------------------------------- reading


def read_status(path: str | Path) -> dict[str, Any] | None:
    """What status.json says, or None where there is none.

    A run that was killed could not say so: if its process is gone on this machine, the state reads `failed`.
    """
    status = _read_json(Path(path) / STATUS_FILE)
    if status and status.get("state") in ("preparing", "running") and _process_exists(status) is False:
        return status | {"state": "failed", "reason": f"process {status.get('pid')} is gone; it was killed or crashed"}
    return status


def read_recipe(path: str | Path) -> dict[str, Any] | None:
    """The options in a run's recipe.yaml, or None where there is none that can be read."""
    try:
        found = yaml.safe_load((Path(path) / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order. Where a resumed run went over the same steps again, the later line counts,
    and so it does where a step is evaluated twice; a line that a crash cut short is left out.
    """
    rows: list[dict[str, Any]] = []
    try:
        lines = (Path(path) / METRICS_FILE).read_bytes().splitlines()
    except FileNotFoundError:
        return rows
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(row, dict) or not isinstance(row.get("step", 0), int):
            continue
        if "step" in row:
            _forget_what_is_said_anew(row, rows)
        rows.append(row)
    return rows


def holds_answers(path: Path) -> bool:
    """Whether a file begins with a line as `predict` writes them."""
    with open(path, encoding="utf-8", errors="replace") as file:
        first = file.readline()
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and "index" in row and ("predict" in row or "rejected" in row)


def _forget_what_is_said_anew(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Take out earlier rows of steps after that of `row`, and the one of its step that has the same figures."""
    kept = []
    while rows and rows[-1].get("step", row["step"]) >= row["step"]:
        earlier = rows.pop()
        if "step" not in earlier or (earlier["step"] == row["step"] and earlier.keys() != row.keys()):
            kept.append(earlier)
    rows += reversed(kept)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _process_exists(status: Mapping[str, Any]) -> bool | None:
    """Whether the process that wrote the status is there; None where it ran on another machine."""
    if status.get("host") != socket.gethostname() or not isinstance(status.get("pid"), int):
        return None
    try:
        os.kill(status["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another person's process
        return True
    return True
