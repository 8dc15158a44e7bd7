"""A stream of rows becomes a stream of token rows, packed if asked; no more of it is held than one buffer.

source ─ TokenStream ─► documents ─ MixedStream ─► documents of several sources ─ PackedStream ─► packed rows
"""

import logging
import random
import types
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any

import datasets
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from tunesmith.data.cursor import snapshot
from tunesmith.data.encode import check_weighed, encode_batch
from tunesmith.data.mix import Cursor, mix_streams, shuffled_stream
from tunesmith.data.pack import TOKEN_COLUMNS, pack
from tunesmith.data.prepare import as_dataset
from tunesmith.data.report import Problem, Report, place
from tunesmith.data.rows import Row
from tunesmith.data.tokenize import Tokens
from tunesmith.train.reading import Preparation, Reader, beside, check_answers, check_report, numbered
from tunesmith.train.ready import fitted, masks_in

logger = logging.getLogger(__name__)

FIRST_ROWS = 8  # of the first batch; the next are each twice as large, so that the first step need not wait
FIRST_SEQUENCES = 16  # packed rows of the first buffer, likewise
SHUFFLED_ROWS = 1000  # held to draw the next from
RECENT_ROWS = 4096  # remembered, to tell which of those that a loader has read were used
LISTED = 1000  # dropped rows that the report of a stream names


class Stream(IterableDataset):
    """Rows that are made while they are read, in the same order for the same epoch.

    With `infinite`, it begins again at its end, as the next epoch. `position` says where it stands, and `take_up` lets
    the next reading begin there, if its sources can (`can_be_taken_up`).
    """

    def __init__(self):
        self.infinite = False
        self.epoch = self._later = 0
        self._cursor: Cursor = {}
        self._taken_up: Cursor | None = None
        self._recent: deque[dict[str, Any]] = deque(maxlen=RECENT_ROWS)

    def set_epoch(self, epoch: int) -> None:
        """What the next pass draws its order from; the source hears of it if it wants to."""
        self.epoch = epoch + self._later

    @property
    def can_be_taken_up(self) -> bool:
        """Whether reading can begin where it was left."""
        raise NotImplementedError

    def one_pass(self, epoch: int, cursor: Cursor) -> Iterator[dict[str, Any]]:
        """The rows from first to last, or from where `cursor` says; it is kept up to date."""
        raise NotImplementedError

    def position(self, last: Any) -> dict[str, Any] | None:
        """Where the stream stands, as JSON, when `last` is the last row that was used of those that it gave.

        Returns: `None` where it cannot be told: the row is another object by now, or was given long ago.
        """
        rows = list(self._recent)
        found = next((index for index, row in enumerate(rows) if row is last), None)
        if found is None or not self.can_be_taken_up:
            return None
        return {**snapshot(self._cursor), "unused": snapshot(rows[found + 1 :])}

    def take_up(self, position: Mapping[str, Any]) -> bool:
        """Begin the next reading at a `position`; what is read after it are the epochs that follow.

        Returns: whether the position lies in the middle of an epoch, and not at its end.
        """
        in_the_middle = bool(position["unused"]) or not position["ended"]
        self._taken_up = dict(position) if in_the_middle else None
        self._later = position["epoch"] + (not in_the_middle)
        return in_the_middle

    def __iter__(self) -> Iterator[dict[str, Any]]:
        begun, self._taken_up = self._taken_up, None
        cursor = self._cursor = begun or {"epoch": self.epoch, "rows": 0, "inside": {}, "ended": False}
        for row in cursor.pop("unused", ()):
            self._recent.append(row)
            yield row
        while True:
            for row in self.one_pass(cursor["epoch"], cursor["inside"]):
                cursor["rows"] += 1
                self._recent.append(row)
                yield row
            if not self.infinite or not cursor["rows"]:
                cursor["ended"] = True
                return
            cursor.update(epoch=cursor["epoch"] + 1, rows=0, inside={})


ENCODED_BY = (
    *("packing", "max_length", "train_on", "too_long", "append_eos", "add_special_tokens", "max_source_length"),
    *("max_target_length", "chat_template_kwargs", "on_bad_row"),
)
"""Options on which the tokens of a row depend."""


class TokenStream(Stream):
    """Rows of a stream as documents of tokens: each read once, by one worker, and counted in the report.

    Args:
        name: what errors call the stream.
        source: iterable of rows: to be rendered and tokenized, or with `input_ids`, which are taken as they are.
        how: the options.
        report: counts rows as they are read, over all epochs; in a worker of a DataLoader its own copy does. The
            first row that is dropped or changed for a reason is logged.
    """

    def __init__(self, name: str, source: Iterable[Mapping[str, Any]], how: Preparation, report: Report):
        super().__init__()
        self.name, self.source, self.how, self.report = name, source, how, report
        self._said: set[str] = set()

    @property
    def can_be_taken_up(self) -> bool:
        """Streams of recipes can, in the process that trains, where the trainer's options ask for nothing on top."""
        plain = not self.how.shuffle and not self.how.keep_columns and not self.how.own_collator
        return plain and get_worker_info() is None and getattr(self.source, "can_be_taken_up", False)

    def identity(self) -> dict[str, Any]:
        """What is read, as far as the source tells, and how it becomes tokens."""
        told = getattr(self.source, "identity", None)
        told = told() if told is not None else {"stream": type(self.source).__name__}
        return told | {name: getattr(self.how, name) for name in ENCODED_BY}

    def one_pass(self, epoch: int, cursor: Cursor) -> Iterator[dict[str, Any]]:
        """The documents; DataError if there is none at all."""
        is_new = not cursor
        if self.can_be_taken_up:
            cursor.setdefault("number", 0)
            waiting = cursor.setdefault("waiting", [])
            while waiting:
                yield waiting.pop(0)
            rows = self._examples(epoch, cursor)
        else:
            if hasattr(self.source, "set_epoch"):
                self.source.set_epoch(epoch)
            rows = rows_of_worker(self.name, self.source)
        if self.how.shuffle:
            rows = shuffled_stream(rows, SHUFFLED_ROWS, random.Random(f"{self.how.seed} {epoch}"))
        first = next(rows, None)
        if first is not None:
            rows = chain([first], rows)
            warn_of_function(self.name, first.value, self.how)
            yield from self._ready(rows) if "input_ids" in first.value else self._encoded(rows, cursor)
        is_alone = get_worker_info() is None  # the share of one of several workers may be empty
        if is_new and is_alone and not self.report.kept:
            check_report(self.name, self.report, self.how.packing)

    def _examples(self, epoch: int, cursor: Cursor) -> Iterator[Row]:
        """The examples of a source that can be taken up, numbered through the pass."""
        for row in numbered(self.name, self.source.read(epoch, cursor.setdefault("source", {})), from_table=False):
            cursor["number"] += 1
            yield row if row.source != self.name else row._replace(line=cursor["number"])

    def _encoded(self, rows: Iterator[Row], cursor: Cursor) -> Iterator[dict[str, Any]]:
        reader, waiting = Reader(self.how), cursor.setdefault("waiting", [])
        characters = int(self.how.max_length * self.how.chars_per_token * self.how.num_of_sequences)
        for batch in growing_batches(rows, self.how.batch_size, characters, cursor):
            part = Report()
            part.read = len(batch)
            sources = {(row.source, row.line): row.value for row in batch}
            examples = reader(batch, part)
            found = encode_batch(examples, self.how.tokenizer, self.how.encoding, part)
            self._count(part)
            for index, tokens in found:
                place_of_row = (examples[index]["source"], examples[index]["line"])
                source = sources[place_of_row] if self.how.keep_columns else {}
                kept = {name: source[name] for name in beside(source, self.how)}
                waiting.append({**kept, **(for_own_collator(tokens, reader) if self.how.own_collator else tokens)})
            while waiting:
                yield waiting.pop(0)

    def _ready(self, rows: Iterator[Row]) -> Iterator[dict[str, Any]]:
        """Rows with `input_ids`: as they are, but for labels; under packing, fitted into a row."""
        for row in rows:
            if "labels" not in row.value and not masks_in(row.value, self.how.train_on):
                check_answers(self.how, place(row.source, row.line), "the row has neither labels nor masks")
            if row.value.get("weights") is not None:
                check_weighed(self.how.unweighed, f"{place(row.source, row.line)}: ")
            part = Report()
            if self.how.own_collator:
                part.read = part.kept = 1
                tokens: Mapping[str, Any] | None = row.value
            else:
                tokens = fitted(row, self.how, part)
            self._count(part)
            if tokens is not None:
                yield {**row.value, **tokens} if self.how.keep_columns else tokens

    def _count(self, part: Report) -> None:
        self._say("dropped", part.drops)
        self._say("changed", part.changes)
        self.report.add(part, limit=LISTED)

    def _say(self, what: str, problems: Iterable[Problem]) -> None:
        """Log the first row that is dropped or changed for a reason: nobody reads the report of an endless stream."""
        for problem in problems:
            if problem.reason not in self._said:
                self._said.add(problem.reason)
                where, why = place(problem.source, problem.line), f"{problem.reason}: {problem.detail}"
                logger.warning("%s is %s (%s); further rows are counted", where, what, why)


def warn_of_function(name: str, columns: Iterable[str], how: Preparation) -> None:
    """Say aloud that rows with `input_ids` need no formatting function."""
    if how.formatting_func is not None and "input_ids" in columns:
        warnings.warn(
            f"{name} has input_ids, so it is not tokenized and formatting_func is not used. Remove the column, or "
            "leave formatting_func out.",
            UserWarning,
            stacklevel=5,
        )


def for_own_collator(tokens: Tokens, reader: Reader) -> dict[str, Any]:
    """A row for a collator of the person's, which may pad `input_ids` and `attention_mask` and know nothing else.

    Labels are left out where they are the ids, as TRL v0.13 did; collators that make labels themselves trip on them.
    """
    row = {name: tokens[name] for name in ("input_ids",) if reader.trains_all} or dict(tokens)
    return row | {"attention_mask": [1] * len(tokens["input_ids"])}


# Reading -----------------------------------------------------------------------------------------------------------


def rows_of_worker(name: str, source: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    """The rows that this process reads: all, or in a DataLoader's worker its share."""
    from_table = isinstance(source, datasets.IterableDataset | datasets.Dataset)
    worker = get_worker_info()
    if worker is None:
        return numbered(name, source, from_table)
    if splits_itself(source):
        return numbered(f"{name} (worker {worker.id})", source, from_table)
    return islice(numbered(name, source, from_table), worker.id, None, worker.num_workers)


def splits_itself(source: Any) -> bool:
    """Whether a stream gives each worker its share: those of `datasets` do, and classes that ask who the worker is."""
    if isinstance(source, datasets.IterableDataset):
        return True
    functions = [item for cls in type(source).__mro__ for item in vars(cls).values()]
    codes = [item.__code__ for item in functions if isinstance(item, types.FunctionType)]
    return any("get_worker_info" in code.co_names for code in codes)


def growing_batches(
    rows: Iterator[Row], most: int | None, characters: int, cursor: Cursor | None = None
) -> Iterator[list[Row]]:
    """Batches of 8, 16, 32, ... rows up to `most`, each ended early at so many characters; `None` or 0: no limit.

    `cursor` keeps the size of the next.
    """
    cursor = {} if cursor is None else cursor
    size, batch, num_characters = cursor.setdefault("size", FIRST_ROWS), [], 0
    limit = most if most and most > 0 else 1 << 62
    for row in rows:
        batch.append(row)
        num_characters += count_characters(row.value)
        if len(batch) >= min(size, limit) or num_characters >= characters:
            full, batch, num_characters = batch, [], 0
            size = cursor["size"] = 2 * size
            yield full
    if batch:
        yield batch


def count_characters(value: Any) -> int:
    """Characters of all texts in a row."""
    if isinstance(value, str):
        return len(value)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(count_characters, items))


# Mixing and packing ------------------------------------------------------------------------------------------------


class MixedStream(Stream):
    """Several streams as one, drawn by weights as `data.mix.plan_mixture` says; without weights one after another."""

    def __init__(self, parts: Sequence[TokenStream], shares: np.ndarray | None, seed: int, stop: str):
        super().__init__()
        self.parts, self.shares, self.seed, self.stop = parts, shares, seed, stop

    @property
    def can_be_taken_up(self) -> bool:
        """Where all parts can."""
        return all(part.can_be_taken_up for part in self.parts)

    def identity(self) -> dict[str, Any]:
        """What the parts are, and how they are mixed."""
        shares = None if self.shares is None else np.asarray(self.shares).tolist()
        return {"parts": [part.identity() for part in self.parts], "shares": shares, "stop": self.stop}

    def one_pass(self, epoch: int, cursor: Cursor) -> Iterator[dict[str, Any]]:
        """Rows of the parts until the first, or the last of them ends; parts that ended begin again until then."""
        passes = [partial(part.one_pass, epoch) for part in self.parts]
        names = [part.name for part in self.parts]
        # a worker's share may be empty
        how = {"stop": self.stop, "names": names, "skip_empty": True, "cursor": cursor}
        yield from mix_streams(passes, self.shares, self.seed, epoch, **how)


class PackedStream(Stream):
    """Documents of a stream packed into rows of `max_length` tokens, a buffer of `num_of_sequences` rows at a time.

    Rows of a buffer come in an order drawn from seed, epoch and the buffer's number, since packing sorts them by
    length. The emptiest row of a buffer waits for the next, so that only the last is not full.

    Args:
        report: gets a note on the tail that exact blocks leave out, once the first pass has come to its end.
    """

    def __init__(self, source: Stream, how: Preparation, report: Report):
        super().__init__()
        self.source, self.how, self.report = source, how, report

    @property
    def can_be_taken_up(self) -> bool:
        """Where its source can."""
        return self.source.can_be_taken_up

    def identity(self) -> dict[str, Any]:
        """What is packed, and how."""
        return self.source.identity() | {"packing_strategy": self.how.packing_strategy}

    def one_pass(self, epoch: int, cursor: Cursor) -> Iterator[dict[str, Any]]:
        """The packed rows; every document is in one of them (or, if it was too long, its pieces are)."""
        cursor.setdefault("size", min(FIRST_SEQUENCES, self.how.num_of_sequences))
        cursor.setdefault("number", 0)
        held, waiting = cursor.setdefault("held", []), cursor.setdefault("waiting", [])
        while waiting:
            yield waiting.pop(0)
        num_tokens = sum(len(document["input_ids"]) for document in held)
        for document in self.source.one_pass(epoch, cursor.setdefault("source", {})):
            held += documents_of(document) if "seq_lengths" in document else [document]
            num_tokens += len(document["input_ids"])
            if num_tokens >= cursor["size"] * self.how.max_length:
                rows, held[:] = self._packed(held, is_last=False)
                waiting += self._drawn(rows, epoch, cursor["number"])
                cursor["size"] = min(2 * cursor["size"], self.how.num_of_sequences)
                cursor["number"] += 1
                num_tokens = sum(len(document["input_ids"]) for document in held)
                while waiting:
                    yield waiting.pop(0)
        if held:
            waiting += self._drawn(self._packed(held, is_last=True)[0], epoch, cursor["number"])
            held.clear()
            while waiting:
                yield waiting.pop(0)

    def _packed(self, documents: list[Tokens], is_last: bool) -> tuple[list[dict[str, Any]], list[Tokens]]:
        """Packed rows, and the documents that wait for the next buffer; of exact blocks only the stream has a tail."""
        exact = self.how.packing_strategy == "blocks"
        strategy = "wrapped" if exact else self.how.packing_strategy
        rows = list(pack(as_dataset(documents), self.how.max_length, strategy))
        if exact and is_last:
            self._note_tail(len(rows[-1]["input_ids"]))
            return [row for row in rows if len(row["input_ids"]) == self.how.max_length], []
        emptiest = min(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
        if is_last or len(rows) == 1 or len(rows[emptiest]["input_ids"]) == self.how.max_length:
            return rows, []
        return rows, documents_of(rows.pop(emptiest))

    def _note_tail(self, tail: int) -> None:
        note = f"the tail of {tail:,} tokens behind the last block of a pass is left out"
        if tail < self.how.max_length and note not in self.report.notes:
            self.report.note(note)
            logger.warning("%s", note)

    def _drawn(self, rows: list[dict[str, Any]], epoch: int, number: int) -> list[dict[str, Any]]:
        random.Random(f"{self.how.seed} {epoch} {number}").shuffle(rows)
        return rows


def documents_of(row: Mapping[str, Any]) -> list[Tokens]:
    """The documents that a packed row holds."""
    ends = np.cumsum(row["seq_lengths"]).tolist()
    names = [name for name in TOKEN_COLUMNS if name in row]
    return [{name: row[name][begin:end] for name in names} for begin, end in zip([0, *ends], ends)]
