"""Run directories → what the studio shows. The files are all there is: nothing is kept between two looks.

A run is known by an id out of `find_runs`, never by a path; only plain files inside its folder are read, and no more
of them than a page can show.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tunesmith.data.report import visible
from tunesmith.deliver.web.launch import Start, read_start
from tunesmith.runs import (
    ALL_RESULTS_FILE,
    COMPARED_FILES,
    DATA_REPORT_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    PREDICTIONS_FILE,
    RECIPE_FILE,
    SAMPLES_FILE,
    STATUS_FILE,
    TRAINER_LOG_FILE,
    checkpoints,
    read_metrics,
    read_status,
)

SIGNS = (STATUS_FILE, METRICS_FILE, TRAINER_LOG_FILE)
FIGURES = ("step", "total_steps", "loss", "eval_loss", "tokens_per_second", "eta_seconds", "started", "updated")
GOING = ("starting", "preparing", "running")

MAX_POINTS = 1500  # of a curve: more than a screen has columns
MAX_ROWS = 30  # of a predictions file
MAX_EVENTS = 200
MAX_BYTES = 2_000_000  # of one file


# ---------------------------------------------------------------------------------------------------- which runs


def find_runs(folder: Path) -> dict[str, Path]:
    """Id → run directory, of every run in the folder or in a folder of it; what was started but wrote nothing, too.

    A folder that is a run itself is the only one. Links that lead out of the folder are left out.
    """
    if _is_run(folder):
        return {folder.resolve().name: folder}
    found: dict[str, Path] = {}
    root = folder.resolve()
    for path in _candidates(folder):
        if (_is_run(path) or read_start(path)) and path.resolve().is_relative_to(root):
            found[path.relative_to(folder).as_posix().replace("/", "~")] = path
    return found


def _candidates(folder: Path) -> Iterator[Path]:
    for path in _visible_folders(folder):
        yield path
        if not _is_run(path):
            yield from _visible_folders(path)


def _visible_folders(folder: Path) -> list[Path]:
    """Its folders, and the places where a started run wants to have one."""
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return []
    started = {entry.name.removesuffix(Start.SUFFIX) for entry in entries if entry.name.endswith(Start.SUFFIX)}
    return sorted({entry for entry in entries if entry.is_dir()} | {folder / name for name in started})


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in SIGNS)


# ---------------------------------------------------------------------------------------------------- one run


def summary(run_id: str, path: Path) -> dict[str, Any]:
    """Where a run stands, in a line of the list."""
    status, start = read_status(path) or {}, read_start(path)
    state, reason = status.get("state") or "unknown", status.get("reason")
    is_early = bool(start) and start.is_newer_than(status.get("started"))  # it has not come to its run directory
    is_alive = is_early and start.is_alive()
    if is_alive:
        state, reason = "starting", None
    elif is_early and not status:
        state = "failed"
    figures = {key: _number_or_text(status.get(key)) for key in FIGURES if status.get(key) is not None}
    if not status:
        figures |= _last_figures(path)
    start_failed = is_early and not is_alive
    known = {"id": run_id, "state": state, "is_going": state in GOING, "reason": _text(reason)}
    return known | {"start_failed": start_failed} | figures


def _last_figures(path: Path) -> dict[str, Any]:
    """Step and losses out of the log of a program that writes no status.json."""
    rows = read_log(path)
    found: dict[str, Any] = {}
    for row in rows:
        found |= {key: row[key] for key in ("step", "total_steps", "loss", "eval_loss") if row.get(key) is not None}
    return found


def details(run_id: str, path: Path) -> dict[str, Any]:
    """All that a run's page shows but the curve."""
    start = read_start(path)
    return {
        **summary(run_id, path),
        "folder": str(path),
        "results": _json(path / ALL_RESULTS_FILE, path),
        "data": data_report(path),
        "answers": answers(path),
        "samples": json_lines(path / SAMPLES_FILE, path, last=MAX_ROWS),
        "checkpoints": [entry.name for entry in checkpoints(path).values()],
        "events": json_lines(path / EVENTS_FILE, path, last=MAX_EVENTS),
        "recipe": read_text(path / RECIPE_FILE, path),
        "card": read_text(path / "README.md", path),
        "output": read_text(start.log, start.log.parent, last=8000) if start else None,
    }


def data_report(path: Path) -> Any:
    """data_report.json with no more rows than a page can show."""
    report = _json(path / DATA_REPORT_FILE, path)
    for part in report.values() if isinstance(report, dict) else ():
        for key in ("dropped_rows", "changed_rows"):
            if isinstance(part, dict) and isinstance(part.get(key), list):
                part[key] = part[key][:MAX_ROWS]
    return report


def answers(path: Path) -> list[dict[str, Any]]:
    """Held-out prompts with the expected text and what the model wrote: before and after training, or only after."""
    before, after = (json_lines(path / name, path, first=MAX_ROWS) for name in COMPARED_FILES.values())
    if not after:
        before, after = [], json_lines(path / PREDICTIONS_FILE, path, first=MAX_ROWS)
    rows = []
    for place, row in enumerate(after):
        shown = {"prompt": row.get("prompt"), "expected": row.get("label"), "after": row.get("predict")}
        if place < len(before):
            shown["before"] = before[place].get("predict")
        rows.append({key: value if isinstance(value, str) else None for key, value in shown.items()})
    return rows


# ---------------------------------------------------------------------------------------------------- the curve


def curve(path: Path) -> dict[str, list[list[float]]]:
    """Name → (step, value) points: `loss`, and each held-out loss (`eval_loss`, `eval_NAME_loss`)."""
    series: dict[str, list[list[float]]] = {}
    for row in read_log(path):
        step = row.get("step")
        for key, value in row.items():
            is_loss = key == "loss" or re.fullmatch(r"eval_(.+_)?loss", key)
            if is_loss and isinstance(value, int | float) and isinstance(step, int) and math.isfinite(value):
                series.setdefault(key, []).append([step, value])
    return {key: thinned(points) for key, points in series.items()}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The log of the run, with `step`: metrics.jsonl, or the trainer_log.jsonl of other programs."""
    if _inside(path / METRICS_FILE, path):
        return read_metrics(path)
    rows = json_lines(path / TRAINER_LOG_FILE, path)
    return [row | {"step": row.get("current_steps")} for row in rows]


def thinned(points: Sequence[list[float]], limit: int = MAX_POINTS) -> list[list[float]]:
    """At most `limit` points: of each stretch the mean, at the step in its middle; the last point stays.

    >>> thinned([[1, 4.0], [2, 2.0], [3, 1.0], [4, 1.0], [5, 0.5]], limit=3)
    [[2, 3.0], [4, 1.0], [5, 0.5]]
    """
    if len(points) <= limit:
        return list(points)
    earlier = points[:-1]
    size = math.ceil(len(earlier) / (limit - 1))
    stretches = [earlier[begin : begin + size] for begin in range(0, len(earlier), size)]
    means = [[each[len(each) // 2][0], sum(value for _, value in each) / len(each)] for each in stretches]
    return [*means, points[-1]]


# ---------------------------------------------------------------------------------------------------- files


def _inside(file: Path, folder: Path) -> bool:
    """Whether it is a plain file that lies in the folder, links followed."""
    return file.is_file() and file.resolve().is_relative_to(folder.resolve())


def read_text(file: Path, folder: Path, last: int | None = None) -> str | None:
    """Its text, or the `last` bytes of it, invisible characters made visible; None where there is no file."""
    if not _inside(file, folder):
        return None
    with open(file, "rb") as opened:
        if last is not None:
            opened.seek(max(0, file.stat().st_size - last))
        raw = opened.read(MAX_BYTES)
    return visible(raw.decode("utf-8", "replace"), keep="\n\t")


def json_lines(file: Path, folder: Path, first: int | None = None, last: int | None = None) -> list[dict[str, Any]]:
    """The objects of its lines, or the first or the last few; lines that are cut short are left out."""
    if not _inside(file, folder):
        return []
    found: list[dict[str, Any]] = []
    with open(file, "rb") as opened:
        for line in opened:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                found.append(_shown(value))
            if first is not None and len(found) >= first:
                break
            if last is not None and len(found) > 2 * last:
                del found[:-last]
    return found if last is None else found[-last:]


def _json(file: Path, folder: Path) -> Any:
    if not _inside(file, folder) or file.stat().st_size > 10 * MAX_BYTES:
        return None
    try:
        return _shown(json.loads(file.read_bytes()))
    except (ValueError, RecursionError):
        return None


def _shown(value: Any) -> Any:
    """The same value, strict JSON, with the texts' invisible characters made visible."""
    if isinstance(value, str):
        return visible(value, keep="\n\t")
    if isinstance(value, dict):
        return {visible(str(key)): _shown(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_shown(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number_or_text(value: Any) -> float | str:
    return value if isinstance(value, int | float) and math.isfinite(value) else visible(str(value))


def _text(value: Any) -> str | None:
    return None if value is None else visible(str(value), keep="\n")
