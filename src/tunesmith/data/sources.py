"""A source becomes examples, one by one: its rows are read as its entry, its columns and the stage say."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

from tunesmith.data.detect import describe_format, detect_format
from tunesmith.data.formats import FORMATS, alpaca_question, columns_of, renamed
from tunesmith.data.load import data_files, good_rows, read_files, read_files_after, read_hub
from tunesmith.data.normalize import MEDIA, Example, normalize
from tunesmith.data.prepare import examples_of
from tunesmith.data.registry import COLUMNS, FILE, Source, check_files, under_our_names
from tunesmith.data.report import Report, place, visible
from tunesmith.data.rows import Row, RowError
from tunesmith.errors import ConfigError, DataError
from tunesmith.lookup import did_you_mean

PEEK = 100  # rows of a stream that its format is found from
COMPARED = ("alpaca", "sharegpt", "messages", "prompt-completion", "preference")  # formats that may hold two answers


class Reading(NamedTuple):
    """What rows are read for."""

    stage: str = "sft"
    text_field: str = "text"
    """Column that holds the text of plain-text rows."""
    on_bad_row: str = "error"
    max_samples: int | None = None
    """At most so many rows that can be read, of each source."""
    answers_needed: bool = True
    streaming: bool = False
    """Rows are read as they are asked for; the format is found from the first."""


def source_examples(
    source: Source, how: Reading, report: Report, place: dict[str, Any] | None = None
) -> Iterator[Example]:
    """The examples of a source, in its order.

    Args:
        report: counts every row that is read, and names those that are dropped.
        place: of a stream, where it stands: kept up to date, and begun at if it is not empty.

    Raises: ConfigError for a source that the stage does not train on; DataError for one that cannot be read; RowError
        for a row that cannot, unless bad rows are skipped.
    """
    check_source(source, how)
    place = {} if place is None else place
    told = Report() if "at" in place else report  # what is told of the files was told when they were opened
    found = source_rows(source, told, how.streaming, place.get("at"))
    peeked = list(islice(found, 0 if "at" in place else PEEK if how.streaming else None))
    rows = islice(good_rows(chain(peeked, found), how.on_bad_row, report), how.max_samples)
    if "at" in place:
        read = _reader(source, place["format"], place["columns"], how)
    else:
        head = [row for row in peeked if isinstance(row, Row)] if how.streaming else list(rows)
        if not head:
            yield from rows  # of which none is good: they are counted, or the first is raised
            return
        format, columns = _format_of(source, head, how)
        _note(source, head, format, columns, how, report)
        read = _reader(source, format, columns, how)
        if how.streaming and source.format is None and columns is source.columns:
            read = _of_one_format(read, head, columns, how)
        place.update(format=format, columns=columns)
        rows = rows if how.streaming else iter(head)
    rows = _placed(rows, place) if how.streaming else rows
    yield from examples_of(rows, read, report, stage=how.stage, on_bad_row=how.on_bad_row)


def _placed(rows: Iterator[Row], place: dict[str, Any]) -> Iterator[Row]:
    """The rows, each noted as the last that was taken."""
    for row in rows:
        place["at"] = [row.source, row.line]
        yield row


def check_source(source: Source, how: Reading) -> None:
    """Refuse a part of a file, and an entry of the registry that the stage cannot use, before anything is read.

    Raises: ConfigError.
    """
    where = f"dataset {visible(source.name, 80)}"
    if not source.is_hub and re.search(r"[\[+]", source.split):
        raise ConfigError(
            f"split: '{visible(source.split, 40)}' takes a part of a Hub dataset, and {where} is a file or folder, "
            "which is read whole. Take the part with max_samples or val_size."
        )
    if not source.is_registered:
        return
    if not source.is_hub and not os.path.exists(source.place):
        raise DataError(f"{where}: its entry in {FILE} names {source.place}, which is not there.{near(source.place)}")
    if "kto_tag" in source.columns:
        raise ConfigError(
            f"{where} marks single answers as good or bad (kto_tag in {FILE}), which no stage trains on. Leave "
            "kto_tag out of its columns to train on all of its answers."
        )
    if how.stage == "rm" and not source.ranking:
        raise ConfigError(
            f"{where} is no ranking: stage rm compares a better and a worse answer. Name one that has both, and mark "
            f"it with ranking: true in {FILE}; or set stage: sft."
        )
    if how.stage != "rm" and source.ranking:
        raise ConfigError(
            f"{where} is a ranking (a better and a worse answer for each prompt), which only stage rm trains on, not "
            f"{how.stage}. Set stage: rm, or name another dataset."
        )
    if how.stage == "pt" and source.format != "alpaca":
        raise ConfigError(f"{where} holds conversations; stage pt learns plain text. Set stage: sft.")
    if how.stage == "sft" and how.answers_needed and source.format == "alpaca" and "output" not in source.columns:
        raise ConfigError(
            f"{where} has no answers: its entry in {FILE} names columns, but no response. Name it there, or set "
            "stage: pt to learn the text of its prompt column."
        )


def near(path: str) -> str:
    """The file beside a missing one that may have been meant."""
    folder, name = os.path.split(path)
    return did_you_mean(name, os.listdir(folder) if os.path.isdir(folder) else [])


def source_rows(
    source: Source, report: Report, streaming: bool = False, after: Sequence[Any] | None = None
) -> Iterator[Row | RowError]:
    """The rows of a source, or those after a file and a line; such that cannot be read as RowErrors in their place."""
    if not source.is_hub:
        files = data_files(source.place, report, "" if source.is_registered else source.name)
        check_files(source, files, report)
        if source.split != "train":
            report.note(f"{source.name}: split {source.split} is for Hub datasets; files are read whole")
        return read_files(files) if after is None else read_files_after(files, *after)
    if os.path.exists(source.place):
        raise ConfigError(
            f"dataset {visible(source.name, 80)}: hf_hub_url is {source.place}, but here is a folder of that name, "
            "which would be read in place of the Hub's. Rename the folder, or run elsewhere."
        )
    options = {"name": source.subset, "data_dir": source.folder, "revision": source.revision}
    rows = read_hub(source.place, source.split, streaming=streaming, **options)
    return rows if after is None else (row for row in rows if row.line > after[1])


# How rows are read -------------------------------------------------------------------------------------------------


def _format_of(source: Source, rows: Sequence[Row], how: Reading) -> tuple[str, Mapping[str, str] | None]:
    """The format of a source, and our columns' names in its rows where they are yet to be renamed."""
    if source.is_registered:
        return source.format, None
    format, columns = source.format, source.columns
    if format is None and columns is None and how.text_field != "text" and how.text_field in rows[0].value:
        format, columns = "text", {"text": how.text_field}
    elif how.stage == "rm" and format in COMPARED:
        format = "preference"
    elif format is None:
        format = detect_format(rows, columns, stage=how.stage, answers_needed=how.answers_needed)
        if format == "text" and how.text_field != "text" and columns is None:
            first = rows[0]
            raise DataError(
                f"{place(first.source, first.line)}: dataset_text_field names the column '{how.text_field}', but the "
                f"row has {columns_of(first.value)}.{did_you_mean(how.text_field, map(str, first.value))} Name the "
                "column that holds the text, or leave it out."
            )
    if how.stage == "pt" and format in FORMATS and format not in ("text", "alpaca"):
        raise DataError(
            f"dataset {visible(source.name, 80)}: stage pt learns plain text, and these rows are {format}. Name the "
            "column that holds the text in columns: {text: ...}, or set stage: sft."
        )
    return format, columns


def _reader(source: Source, format: str, columns: Mapping[str, str] | None, how: Reading) -> Callable[[Row], Example]:
    """Row → Example. Under stage pt the prompt of Alpaca-like rows is the text."""
    is_prompt_text = how.stage == "pt" and format == "alpaca"

    def read(row: Row) -> Example:
        value = row.value
        try:
            if source.is_registered:
                value = under_our_names(value, source) | {name: value[name] for name in MEDIA if name in value}
            if is_prompt_text:
                ours = renamed(value, columns) if columns else value
                value = {"text": alpaca_question(ours)} | {name: value[name] for name in MEDIA if name in value}
        except RowError as error:
            raise error.at(row.source, row.line) from None
        row = row._replace(value=value)
        if is_prompt_text:
            return normalize(row, "text")
        return normalize(row, format, columns, source.system_prompt, answers_needed=how.answers_needed)

    return read


def _of_one_format(
    read: Callable[[Row], Example], head: Sequence[Row], columns: Mapping[str, str] | None, how: Reading
) -> Callable[[Row], Example]:
    """`read`, where a row behind those that the format was found from has another format: an error, as in a table."""

    def checked(row: Row) -> Example:
        try:
            return read(row)
        except RowError as error:
            if error.reason == "missing-column":
                detect_format([*head, row], columns, stage=how.stage, answers_needed=how.answers_needed)
            raise

    return checked


def _note(
    source: Source,
    rows: Sequence[Row],
    format: str,
    columns: Mapping[str, str] | None,
    how: Reading,
    report: Report,
) -> None:
    """Say how the source is read, and what of it is not."""
    report.note(describe_format(format, *_as_read(source, rows[0], columns)))
    names = (source.columns if source.is_registered else columns) or {}
    if how.stage == "pt" and format == "alpaca" and names.get("output", "output") in rows[0].value:
        report.note(f"{source.name}: stage pt learns the prompts; the answers are not read")
    if not source.is_registered:
        return
    if os.path.exists(os.path.expanduser(source.name)):
        report.note(
            f"{source.name}: the entry of {FILE}, not the file or folder of that name (that is ./{source.name})"
        )
    for ours, theirs in source.columns.items():
        is_default = theirs == COLUMNS.get(ours, ours) or ours == theirs
        if not is_default and not any(theirs in row.value for row in rows):
            hint = did_you_mean(theirs, map(str, rows[0].value))
            report.note(f"{source.name}: no row has the column '{theirs}' that {FILE} names as {ours}.{hint}")


def _as_read(source: Source, row: Row, columns: Mapping[str, str] | None) -> tuple[Row, Mapping[str, str] | None]:
    """A row for `describe_format`: of a registry's entry only what the entry names counts as read."""
    if not source.is_registered:
        return row, columns
    read = {ours: None for ours, theirs in source.columns.items() if theirs in row.value}
    rest = {name: None for name in row.value if name not in source.columns.values() and name not in COLUMNS.values()}
    return row._replace(value=read | rest), None
