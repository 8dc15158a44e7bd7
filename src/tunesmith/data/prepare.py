"""Rows in, tokenized rows out: normalize, render, tokenize and fit every row, and report what became of each."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import datasets

from tunesmith.data.cache import Cache, key_of
from tunesmith.data.encode import Encoding
from tunesmith.data.normalize import Example, normalize, unread_keys
from tunesmith.data.pack import dataset_of
from tunesmith.data.parallel import encode_batches, num_workers
from tunesmith.data.report import Report, visible
from tunesmith.data.rows import Row, RowError
from tunesmith.data.tokenize import Tokens, token_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 1000
TOKEN_TYPES = {
    "input_ids": datasets.List(datasets.Value("int64")),
    "labels": datasets.List(datasets.Value("int64")),
    "weights": datasets.List(datasets.Value("float32")),
}
Item = TypeVar("Item")


def normalized(
    rows: Iterable[Row],
    report: Report,
    *,
    format: str,
    columns: dict[str, str] | None = None,
    system_prompt: str | None = None,
    on_bad_row: str = "error",
    always_dropped: Sequence[str] = (),
    stage: str = "sft",
) -> list[Example]:
    """Rows of one format as Examples; a bad row raises, is skipped, or is dropped for a reason in `always_dropped`."""
    rules = {"stage": stage, "on_bad_row": on_bad_row, "always_dropped": always_dropped}
    read = partial(normalize, format=format, columns=columns, system_prompt=system_prompt)
    return list(examples_of(rows, read, report, **rules))


def examples_of(
    rows: Iterable[Row],
    read: Callable[[Row], Example],
    report: Report,
    *,
    stage: str = "sft",
    on_bad_row: str = "error",
    always_dropped: Sequence[str] = (),
) -> Iterator[Example]:
    """Examples that `read` makes of rows, one by one; a bad row, or one for another stage, as in `normalized`."""
    unread: set[str] = set()
    for row in rows:
        try:
            example = read(row)
            check_stage(example, stage)
        except RowError as error:
            if on_bad_row == "error" and error.reason not in always_dropped:
                raise
            report.dropped(error.reason, row, str(error))
        else:
            unread |= unread_keys(example)
            yield example
    if unread:
        names = ", ".join(visible(str(name), 40) for name in sorted(unread, key=str)[:12])
        report.note(f"keys of turns that nothing reads but a chat template that knows them: {names}")


def check_stage(example: Example, stage: str) -> None:
    """Refuse an example that the stage does not train on.

    Raises: RowError.
    """
    if ("chosen" in example) == (stage == "rm") and ("text" in example or stage != "pt"):
        return
    if stage == "rm":
        what = (
            "stage rm compares two answers, and this row has not two. Set stage: sft, or give 'chosen' and 'rejected'."
        )
    elif "chosen" in example:
        what = f"stage {stage} does not compare answers, and this row has a better and a worse one. Set stage: rm."
    else:
        what = "stage pt learns plain text, and this row is a conversation. Set stage: sft, or give a column of text."
    raise RowError(what, "wrong-stage").at(example["source"], example["line"])


def note_duplicates(report: Report, duplicates: int, of: int) -> None:
    """Say how many examples repeat an earlier one, if any does."""
    if duplicates:
        report.note(f"{duplicates} of {of} examples repeat an earlier one word for word (kept)")


def encode_examples(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    report: Report,
    *,
    batch_size: int | None = BATCH_ROWS,
    num_proc: int | None = None,
    cache: Cache | None = None,
    **encoding: Any,
) -> datasets.Dataset:
    """Examples as rows of `input_ids`, `labels` and, if some differ from 1, `weights`.

    Args:
        report: every row that is dropped or changed is counted there, and the tokens of those kept.
        batch_size: examples at once; `None` or below 1: all.
        num_proc: processes; `None`: chosen by rows and cores, see `parallel.num_workers`.
        cache: where the rows are kept and read again, see `cache.cache_of`; `None`: nowhere.
        encoding: options of `Encoding`.

    Raises: RowError, TemplateError for an example that cannot be labelled exactly, unless skipped; DataError for one
        that is too long under `too_long="error"`.
    """
    how = Encoding(**encoding)

    def encoded(counts: Report) -> datasets.Dataset:
        workers = num_workers(num_proc, len(examples), tokenizer, how)
        parts = encode_batches(batched(examples, batch_size), tokenizer, how, counts, workers)
        return joined([dataset_of(part.table) for part in parts])

    if cache is None:
        return encoded(report)
    key = key_of(examples, tokenizer, vars(how)) if len(examples) >= cache.min_rows else None
    return cache.fetch(key, encoded, report, len(examples))


def batched(items: Iterable[Item], size: int | None) -> Iterator[list[Item]]:
    """Lists of `size` items, the last shorter; `None` or a size below 1 makes one list of all."""
    rest = iter(items)
    while batch := list(islice(rest, size if size and size > 0 else None)):
        yield batch


def as_dataset(tokens: Sequence[Tokens]) -> datasets.Dataset:
    """Token lists as a `datasets.Dataset`; `weights` only if some row has them."""
    return dataset_of(token_table(tokens))


def joined(parts: Sequence[datasets.Dataset]) -> datasets.Dataset:
    """Token rows of several datasets, one after another; those without `weights` get ones if any has them."""
    parts = [part for part in parts if len(part)]
    if not parts:
        return as_dataset([])
    if any("weights" in part.column_names for part in parts):
        parts = [part if "weights" in part.column_names else _with_ones(part) for part in parts]
    return datasets.concatenate_datasets(parts)


def _with_ones(part: datasets.Dataset) -> datasets.Dataset:
    ones = [[1.0] * len(ids) for ids in part["input_ids"]]
    return part.add_column("weights", ones, feature=TOKEN_TYPES["weights"])
