"""Rows in, tokenized rows out: normalize, render, tokenize and fit every row, and report what became of each."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import datasets

from tunesmith.data import IGNORE_INDEX
from tunesmith.data.chat_template import place_of
from tunesmith.data.detect import describe_format, detect_format
from tunesmith.data.normalize import Example, count_duplicates, normalize
from tunesmith.data.render import Rendered, drop_oldest_turns, render
from tunesmith.data.report import Report
from tunesmith.data.rows import Row, RowError
from tunesmith.data.tokenize import Tokens, tokenize, truncate
from tunesmith.errors import DataError, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 500


def read_examples(
    rows: Sequence[Row],
    report: Report,
    *,
    format: str | None = None,
    columns: dict[str, str] | None = None,
    system_prompt: str | None = None,
    on_bad_row: str = "error",
) -> list[Example]:
    """Rows as Examples, in the given or detected format.

    Args:
        report: rows that are skipped (`on_bad_row="skip"`), the format and duplicates are noted there.

    Raises: DataError for rows of no known format; RowError for a row that does not fit, unless skipped.
    """
    if not rows:
        return []
    format = format or detect_format(rows, columns)
    report.note(describe_format(format, rows[0], columns))
    examples = []
    for row in rows:
        try:
            examples.append(normalize(row, format, columns, system_prompt))
        except RowError as error:
            if on_bad_row == "error":
                raise
            report.dropped(error.reason, row, str(error))
    if duplicates := count_duplicates(examples):
        report.note(f"{duplicates} of {len(examples)} examples repeat an earlier one word for word (kept)")
    return examples


def encode_examples(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    report: Report,
    *,
    train_on: str = "assistant",
    too_long: str = "drop",
    max_length: int | None = None,
    on_bad_row: str = "error",
) -> datasets.Dataset:
    """Examples as rows of `input_ids`, `labels` and, if some differ from 1, `weights`.

    Args:
        report: every row that is dropped or changed is counted there, and the tokens of those kept.
        too_long: what happens to an example of more than `max_length` tokens.

    Raises: RowError, TemplateError for an example that cannot be labelled exactly, unless skipped; DataError for one
        that is too long under `too_long="error"`.
    """
    kept: list[Tokens] = []
    for begin in range(0, len(examples), BATCH_ROWS):
        batch = examples[begin : begin + BATCH_ROWS]
        for example, tokens in _encoded(batch, tokenizer, report, train_on, on_bad_row):
            fitted = tokens
            if max_length is not None and len(tokens["input_ids"]) > max_length:
                fitted = _fitted(example, tokens, tokenizer, report, train_on, too_long, max_length)
            if fitted is not None and _trains(fitted, example, report, cut=fitted is not tokens):
                kept.append(fitted)
    report.add_tokens(kept)
    report.kept += len(kept)
    return as_dataset(kept)


def _encoded(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", report: Report, train_on: str, on_bad_row: str
) -> Iterator[tuple[Example, Tokens]]:
    """Render and tokenize one batch; bad examples raise, or are counted and left out."""
    rendered: list[tuple[Example, Rendered]] = []
    for example in examples:
        try:
            rendered.append((example, render(example, tokenizer, train_on=train_on)))
        except (RowError, TemplateError) as error:
            if on_bad_row == "error":
                raise
            report.dropped(getattr(error, "reason", "template"), example, str(error))
    failed: set[int] = set()

    def on_error(index: int, error: RowError) -> None:
        example = rendered[index][0]
        if on_bad_row == "error":
            raise error.at(example.get("source", "example"), example.get("line", index + 1))
        failed.add(index)
        report.dropped(error.reason, example, str(error))

    def on_change(index: int, reason: str) -> None:
        report.changed(reason, rendered[index][0], "the answer's first token is not merged with the prompt's last")

    tokens = tokenize([row for _, row in rendered], tokenizer, on_change, on_error)
    for index, (example, _) in enumerate(rendered):
        if index not in failed:
            yield example, tokens[index]


def _fitted(
    example: Example,
    tokens: Tokens,
    tokenizer: "PreTrainedTokenizerBase",
    report: Report,
    train_on: str,
    too_long: str,
    max_length: int,
) -> Tokens | None:
    """The example within `max_length` tokens, the way `too_long` says; `None` if it is dropped."""
    size = f"{len(tokens['input_ids'])} tokens, max_length is {max_length}"
    if too_long == "error":
        raise DataError(
            f"{place_of(example)}{size}. "
            "Raise max_length, shorten the row, or set too_long: drop, truncate or keep_last_turns."
        )
    if too_long == "truncate":
        report.changed("cut", example, size)
        return truncate(tokens, max_length)
    shorter: Example | None = example
    while too_long == "keep_last_turns" and (shorter := drop_oldest_turns(shorter)) is not None:
        found = tokenize([render(shorter, tokenizer, train_on=train_on)], tokenizer)[0]
        if len(found["input_ids"]) <= max_length:
            report.changed("turns-dropped", example, size)
            return found
    report.dropped("too-long", example, size)
    return None


def _trains(tokens: Tokens, example: Example, report: Report, cut: bool) -> bool:
    """Whether some token after the first is trained; if none is, the example is counted as dropped."""
    if any(label != IGNORE_INDEX for label in tokens["labels"][1:]):
        return True
    if cut:
        report.changes.pop()  # it was cut, and then nothing was left of it to train
    report.dropped("no-trained-token", example, "the answer lies beyond max_length" if cut else "")
    return False


def as_dataset(tokens: Sequence[Tokens]) -> datasets.Dataset:
    """Token lists as a `datasets.Dataset`; `weights` only if some row has them."""
    columns: dict[str, list[Any]] = {
        "input_ids": [row["input_ids"] for row in tokens],
        "labels": [row["labels"] for row in tokens],
    }
    types = {name: datasets.List(datasets.Value("int64")) for name in columns}
    if any("weights" in row for row in tokens):
        columns["weights"] = [row.get("weights") or [1.0] * len(row["input_ids"]) for row in tokens]
        types["weights"] = datasets.List(datasets.Value("float32"))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(types))


def prepare(
    rows: Sequence[Row],
    tokenizer: "PreTrainedTokenizerBase",
    report: Report,
    *,
    format: str | None = None,
    columns: dict[str, str] | None = None,
    system_prompt: str | None = None,
    on_bad_row: str = "error",
    **encoding: Any,
) -> datasets.Dataset:
    """`read_examples` and `encode_examples` in one call; `encoding` are the latter's options."""
    examples = read_examples(
        rows, report, format=format, columns=columns, system_prompt=system_prompt, on_bad_row=on_bad_row
    )
    return encode_examples(examples, tokenizer, report, on_bad_row=on_bad_row, **encoding)
