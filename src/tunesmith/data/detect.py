"""Rows → the name of their format, or a sentence that names the closest one and what to rename."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from tunesmith.data.formats import FORMATS, Format, columns_of, renamed
from tunesmith.data.normalize import ANSWERS
from tunesmith.data.report import place, visible
from tunesmith.data.rows import Row
from tunesmith.errors import ConfigError, DataError
from tunesmith.lookup import did_you_mean

# Names that other data gives to our columns, for suggestions only.
NICKNAMES: dict[str, tuple[str, ...]] = {
    "instruction": ("question", "query", "prompt", "user", "input"),
    "output": ("answer", "response", "completion", "target", "assistant"),
    "prompt": ("question", "query", "instruction", "source", "user", "input"),
    "completion": ("answer", "response", "output", "target", "assistant"),
    "messages": ("conversation", "conversations", "dialog", "dialogue", "chat", "turns"),
    "conversations": ("conversation",),
    "text": ("content", "document", "body"),
}


def detect_format(
    rows: Sequence[Row],
    columns: Mapping[str, str] | None = None,
    *,
    stage: str = "sft",
    answers_needed: bool = True,
) -> str:
    """The name of the format whose columns the rows have; `columns` and `answers_needed` as in `normalize`.

    Stage rm takes preference pairs alone, the other stages everything else.

    A row that has the columns of no format does not change the answer: `normalize` says what it lacks. A column that
    is null is as good as absent: tables fill it in where rows of several shapes are put together.

    Raises: DataError if rows have different formats, or no row has the columns of any; ConfigError if that is because
        `columns` names what no format reads.
    """
    seen: dict[str, Row] = {}
    names: dict[tuple[str, ...], str | None] = {}
    for row in rows:
        keys = tuple(key for key, item in row.value.items() if item is not None)
        if keys not in names:
            filled = {key: row.value[key] for key in keys}
            names[keys] = _format_of(renamed(filled, columns) if columns else filled, stage, answers_needed)
            if (name := names[keys]) is not None:
                seen.setdefault(name, row)
    if len(seen) > 1:
        (one, row), (other, other_row) = list(seen.items())[:2]
        raise DataError(
            f"the rows have different formats: {place(row.source, row.line)} is {one}, "
            f"{place(other_row.source, other_row.line)} is {other}. Train on one format at a time, or convert one."
        )
    if not seen:
        check_columns(columns or {})
        raise DataError(_no_format(rows[0], columns, stage) if rows else "there are no rows to detect a format from.")
    return next(iter(seen))


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise ConfigError for a name in `columns` that no format reads."""
    known = list(dict.fromkeys(name for one in FORMATS.values() for name in (*one.columns, *one.optional)))
    for ours in columns:
        if ours not in known:
            raise ConfigError(f"columns: no format reads '{ours}'.{did_you_mean(ours, known)}")


def _format_of(value: Mapping[str, Any], stage: str, answers_needed: bool) -> str | None:
    is_pair = {"chosen", "rejected"} <= value.keys()
    if stage == "rm":
        is_list = isinstance(value.get("output"), (list, tuple))  # of both answers, as the oldest rankings have it
        return "preference" if is_pair or ("instruction" in value and is_list) else None
    if is_pair:  # UltraFeedback's have the better one as a conversation, too
        return "messages" if _ends_with_answer(value.get("messages")) else None
    absent = () if answers_needed else ANSWERS
    for name, format in FORMATS.items():
        if all(column in value or column in absent for column in format.columns):
            return name
    return None


def _ends_with_answer(turns: Any) -> bool:
    is_list = isinstance(turns, list | tuple) and turns and isinstance(turns[-1], Mapping)
    return bool(is_list) and turns[-1].get("role") == "assistant"


def _no_format(row: Row, columns: Mapping[str, str] | None, stage: str) -> str:
    value = renamed(row.value, columns) if columns else row.value
    present = [str(key) for key in value]
    if stage == "rm":
        if null := [name for name in ("chosen", "rejected") if name in value and value[name] is None]:
            return (
                f"{place(row.source, row.line)}: stage rm compares two answers, and {' and '.join(null)} "
                f"hold{'s' * (len(null) == 1)} nothing (null). Write both answers, or leave the row out."
            )
        return (
            f"{place(row.source, row.line)}: stage rm compares two answers, and the row has the columns "
            f"{columns_of(value)}. Name them in columns: {{chosen: ..., rejected: ...}}, or set stage: sft."
        )
    found = f"{place(row.source, row.line)}: no known format has the columns {columns_of(value)}"
    formats = {name: format for name, format in FORMATS.items() if name != "preference"}
    choose = f"set format: to one of {_names(formats)} or to file.py:function"
    if {"chosen", "rejected"} <= value.keys():
        return f"{found}: these are preference pairs, and stage sft trains on single answers. To use a part, {choose}."
    if inside := [key for key, held in row.value.items() if _are_rows(held)]:
        name, count, path = visible(inside[0]), len(row.value[inside[0]]), visible(row.source)
        return (
            f"{found}, and {name} holds a list of {count:,} objects. If those are the rows, write them into a file of "
            f"their own: jq '.[\"{name}\"]' {path} > rows.json"
        )
    if not any(_guess(ours, present) for format in formats.values() for ours in format.columns):
        known = "; ".join(f"{name} ({_names(format.columns)})" for name, format in formats.items())
        return f"{found}. Known: {known}. Name yours in columns: {{prompt: ..., completion: ...}}, or {choose}."
    nearest = max(formats, key=lambda name: _nearness(formats[name], present))
    wanted = _names(formats[nearest].columns)
    if null := [ours for ours in formats[nearest].columns if ours in value and value[ours] is None]:
        return (
            f"{found}, of which {_names(null)} hold{'s' * (len(null) == 1)} nothing (null). The closest is {nearest} "
            f"({wanted}). Write the values, or {choose}."
        )
    guesses = {ours: _guess(ours, present) for ours in formats[nearest].columns if ours not in present}
    renames = ", ".join(f"{ours}: {visible(theirs or '...', 40)}" for ours, theirs in guesses.items())
    hint = "".join(did_you_mean(theirs, [ours]) for ours, theirs in guesses.items() if theirs)
    return f"{found}. The closest is {nearest} ({wanted}).{hint} Set columns: {{{renames}}}, or {choose}."


def _are_rows(held: Any) -> bool:
    """Whether a column's value looks like rows, and not like the turns of one: objects that say no role."""
    is_list = isinstance(held, list | tuple) and held and all(isinstance(item, Mapping) for item in held)
    return bool(is_list) and not any({"role", "from"} & item.keys() for item in held)


def _nearness(format: Format, present: Sequence[str]) -> float:
    return sum(_similarity(ours, _guess(ours, present)) for ours in format.columns) / len(format.columns)


def _guess(ours: str, present: Sequence[str]) -> str | None:
    """The column that most likely is ours, if any comes near."""
    best = max(present, key=lambda theirs: _similarity(ours, theirs), default=None)
    return best if best is not None and _similarity(ours, best) >= 0.6 else None


def _similarity(ours: str, theirs: str | None) -> float:
    if theirs is None:
        return 0.0
    if theirs.lower() in NICKNAMES.get(ours, ()):
        return 0.8
    return SequenceMatcher(None, ours, theirs.lower()).ratio()


def describe_format(format: str, row: Row, columns: Mapping[str, str] | None = None) -> str:
    """A line for the report: the format, the columns of `row` that it reads, and those that it does not.

    >>> describe_format("text", Row({"text": "a", "id": 1}, "a.jsonl", 1))
    'format: text (column text; not read: id)'
    """
    present = list(renamed(row.value, columns) if columns else row.value)
    if format not in FORMATS:
        return f"format: {visible(format)}"
    known = (*FORMATS[format].columns, *FORMATS[format].optional)
    read = [name for name in present if name in known]
    rest = [name for name in present if name not in known]
    unread = f"; not read: {_names(rest[:12])}" if rest else ""
    return f"format: {format} ({'column' if len(read) == 1 else 'columns'} {_names(read)}{unread})"


def _names(names: Iterable[str]) -> str:
    return ", ".join(visible(name, 40) for name in names)
