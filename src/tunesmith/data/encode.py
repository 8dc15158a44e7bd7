"""Examples → token rows that fit: rendered, tokenized, cut or dropped, batch by batch, here or in worker processes."""

import os
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.data import IGNORE_INDEX
from tunesmith.data.chat_template import place_of
from tunesmith.data.normalize import Example
from tunesmith.data.render import Rendered, drop_oldest_turns, render
from tunesmith.data.report import Report
from tunesmith.data.rows import RowError
from tunesmith.data.tokenize import Tokens, tokenize, truncate
from tunesmith.errors import DataError, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoding:
    """How examples become tokens: the training options of these names."""

    train_on: str = "assistant"
    too_long: str = "drop"
    max_length: int | None = None
    """`None`: any length."""
    on_bad_row: str = "error"
    append_eos: bool = True
    add_special_tokens: bool = True
    """Of plain text: what the tokenizer puts around every text, such as BOS."""
    label_with: Callable[[list[int]], list[int]] | None = None
    """Ids → labels, in place of those that `train_on` gives."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Variables of the template; an example's own win."""

    def render(self, example: Example, tokenizer: "PreTrainedTokenizerBase") -> Rendered:
        """`render.render` with these options."""
        return render(
            example,
            tokenizer,
            train_on=self.train_on,
            append_eos=self.append_eos,
            add_special_tokens=self.add_special_tokens,
            chat_template_kwargs=self.chat_template_kwargs,
        )


class Encoded(NamedTuple):
    """What became of one example of a batch."""

    index: int
    tokens: Tokens


def encode_batch(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", how: Encoding, report: Report
) -> list[Encoded]:
    """The examples that are trained on, as tokens, in their order.

    Args:
        report: every row that is dropped or changed is counted there, and the rows and tokens of those kept.

    Raises: RowError, TemplateError for an example that cannot be labelled exactly, unless skipped; DataError for one
        that is too long under `too_long="error"`.
    """
    kept = []
    for index, tokens, is_split, left_out in _tokenized(examples, tokenizer, how, report):
        fitted = fit(examples[index], tokens, tokenizer, how, report)
        if fitted is not None:
            kept.append(Encoded(index, fitted))
            if is_split:
                what = "the answer's first token is not merged with the prompt's last"
                report.changed("split-at-boundary", examples[index], what)
            if left_out:
                what = f"{left_out} earlier turns, which the template does not write"
                report.changed("history-left-out", examples[index], what)
    report.add_tokens(tokens for _, tokens in kept)
    report.kept += len(kept)
    return kept


def _tokenized(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", how: Encoding, report: Report
) -> Iterator[tuple[int, Tokens, bool, int]]:
    """Each example's index and tokens, whether its answer was encoded apart, and how many turns its template left out.

    Bad ones raise or are counted.
    """
    rendered: list[tuple[int, Rendered]] = []
    for index, example in enumerate(examples):
        try:
            rendered.append((index, how.render(example, tokenizer)))
        except (RowError, TemplateError) as error:
            if how.on_bad_row == "error":
                raise
            report.dropped(getattr(error, "reason", "template"), example, str(error))
    failed: set[int] = set()
    split: set[int] = set()

    def on_error(number: int, error: RowError) -> None:
        example = examples[rendered[number][0]]
        if how.on_bad_row == "error":
            raise error.at(example.get("source", "example"), example.get("line", number + 1))
        failed.add(number)
        report.dropped(error.reason, example, str(error))

    tokens = tokenize([row for _, row in rendered], tokenizer, lambda number, _: split.add(number), on_error)
    for number, (index, row) in enumerate(rendered):
        if number not in failed:
            yield index, tokens[number], number in split, row.left_out


def fit(
    example: Example, tokens: Tokens, tokenizer: "PreTrainedTokenizerBase", how: Encoding, report: Report
) -> Tokens | None:
    """The tokens within `how.max_length` and labelled; `None` for a row that is dropped, which is then counted."""
    fitted, reason, size = tokens, "", f"{len(tokens['input_ids'])} tokens, max_length is {how.max_length}"
    if how.max_length is not None and len(tokens["input_ids"]) > how.max_length:
        fitted, reason = _shortened(example, tokens, tokenizer, how, size)
    if fitted is None:
        report.dropped(reason, example, size)
        return None
    if how.label_with is not None:
        fitted = {**fitted, "labels": own_labels(example, fitted["input_ids"], how.label_with)}
    if any(label != IGNORE_INDEX for label in fitted["labels"][1:]):
        if reason:
            report.changed(reason, example, size)
        return fitted
    why = "what would be trained lies beyond max_length" if reason else ""
    if how.label_with is not None:
        why = "the collator's template does not occur in it" + (", or was cut off" if reason else "")
    report.dropped("no-trained-token", example, why)
    return None


def own_labels(example: Example, ids: list[int], label_with: Callable[[list[int]], list[int]]) -> list[int]:
    """Labels by a person's function, whose errors know nothing of rows."""
    try:
        return label_with(ids)
    except DataError as error:
        error.args = (f"{place_of(example)}{error}", *error.args[1:])
        raise


def _shortened(
    example: Example, tokens: Tokens, tokenizer: "PreTrainedTokenizerBase", how: Encoding, size: str
) -> tuple[Tokens | None, str]:
    """The example within `max_length` tokens, the way `too_long` says, or `None`; and the reason for the report."""
    if how.too_long == "error":
        raise DataError(
            f"{place_of(example)}{size}. Raise max_length, shorten the row, or set too_long: drop, truncate, "
            "truncate_left or keep_last_turns."
        )
    if how.too_long in ("truncate", "truncate_left"):
        return truncate(tokens, how.max_length, "left" if how.too_long == "truncate_left" else "right"), "cut"
    shorter: Example | None = example
    while how.too_long == "keep_last_turns" and (shorter := drop_oldest_turns(shorter)) is not None:
        found = tokenize([how.render(shorter, tokenizer)], tokenizer)[0]
        if len(found["input_ids"]) <= how.max_length:
            return found, "turns-dropped"
    return None, "too-long"


# Several processes -------------------------------------------------------------------------------------------------


def encode_batches(
    batches: Iterable[Sequence[Example]],
    tokenizer: "PreTrainedTokenizerBase",
    how: Encoding,
    report: Report,
    num_proc: int | None = None,
) -> Iterator[tuple[Sequence[Example], list[Encoded]]]:
    """`encode_batch` of each batch, in their order and with the same result for every number of processes.

    Args:
        batches: read a few ahead of what is taken, never all at once.
        num_proc: worker processes; `None` or 1: this one.
    """
    if num_proc is None or num_proc < 2:
        for batch in batches:
            yield batch, encode_batch(batch, tokenizer, how, report)
        return
    waiting: deque[tuple[Sequence[Example], Future]] = deque()
    is_of_script = type(tokenizer).__module__ == "__main__"  # which workers must then import
    context = SpawnContext() if is_of_script else _WorkerContext()
    with ProcessPoolExecutor(num_proc, context, _start_worker, (tokenizer, how)) as pool:
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(_work, batch)))
                if len(waiting) > 2 * num_proc:
                    yield _result(*waiting.popleft(), report)
            while waiting:
                yield _result(*waiting.popleft(), report)
        finally:
            pool.shutdown(cancel_futures=True)


def _result(batch: Sequence[Example], future: Future, report: Report) -> tuple[Sequence[Example], list[Encoded]]:
    encoded, part = future.result()
    report.add(part)
    return batch, encoded


_OF_WORKER: dict[str, Any] = {}  # filled in worker processes only


def _start_worker(tokenizer: "PreTrainedTokenizerBase", how: Encoding) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _OF_WORKER.update(tokenizer=tokenizer, how=how)


def _work(batch: Sequence[Example]) -> tuple[list[Encoded], Report]:
    part = Report()
    return encode_batch(batch, _OF_WORKER["tokenizer"], _OF_WORKER["how"], part), part


class _Worker(SpawnProcess):
    """A spawned process that does not import the person's script.

    Python would import it to find what the script defines, and so run again what stands outside of
    `if __name__ == "__main__"`: loading the model, and starting workers. Nothing of the script is needed here.
    """

    @staticmethod
    def _Popen(process: BaseProcess) -> Any:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            return SpawnProcess._Popen(process)
        finally:
            sys.modules["__main__"] = main


class _WorkerContext(SpawnContext):
    Process = _Worker
