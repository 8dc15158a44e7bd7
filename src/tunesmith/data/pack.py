"""Short documents → rows of at most max_length tokens: best-fit-decreasing, cut to fill every row, or exact blocks.

A plan is made from the lengths alone; documents of one length are interchangeable, and so are rows with the same free
space, so ten million documents are a few thousand array operations.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args
from uuid import uuid4

import numpy as np

from tunesmith.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

    from tunesmith.data.report import Report

PackingStrategy = Literal["bfd", "bfd_split", "wrapped", "blocks"]
TOKEN_COLUMNS = ("input_ids", "labels", "weights")
TOKENS_PER_CHUNK = 1 << 20  # gathered at once: temporaries of some 30 MiB, which need no fresh pages for each chunk


@dataclass(frozen=True)
class PackingPlan:
    """Which documents share a row: `plan[i]` are the document indices of row i, longest first."""

    order: np.ndarray
    """All document indices, row after row."""
    offsets: np.ndarray
    """Where each row begins in `order`; one more entry than rows."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of a plan with {len(self)} rows")
        row %= len(self)
        return self.order[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))


def plan_packing(lengths: Sequence[int] | np.ndarray, capacity: int) -> PackingPlan:
    """Best-fit-decreasing: the longest first, each into the fullest row it fits in, else into a new row.

    Exact, deterministic; documents of equal length keep their order. Time and memory are linear in the number of
    documents (plus their sort).

    Args:
        lengths: tokens of each document.
        capacity: tokens of a row.

    Raises: DataError if a document is empty or longer than `capacity`.

    >>> [row.tolist() for row in plan_packing([3, 1, 2], 4)]
    [[0, 1], [2]]
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    _check_lengths(lengths, capacity)
    by_length = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    rows = _Rows(capacity, len(lengths))
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist()):
        rows.place(size, count)
    # A row's documents were placed longest first, so a stable sort by row keeps them so.
    order = by_length[np.argsort(rows.row_of, kind="stable")]
    per_row = np.bincount(rows.row_of, minlength=rows.num_rows)
    return PackingPlan(order, np.concatenate([[0], np.cumsum(per_row)]).astype(np.int64))


def length_before_packing(max_length: int | None, strategy: PackingStrategy, too_long: str) -> int | None:
    """Tokens that a document may have before it is packed: any number (`None`) where packing itself cuts long ones.

    Blocks have no longest document: `too_long` says nothing about them.
    """
    packing_cuts = strategy == "blocks" or (strategy != "bfd" and too_long.startswith("truncate"))
    return None if packing_cuts else max_length


def _check_lengths(lengths: np.ndarray, capacity: int) -> None:
    for is_wrong, what in (
        (lengths > capacity, f"more than the {capacity} of a row"),
        (lengths < 1, "nothing to train"),
    ):
        if is_wrong.any():
            index = int(is_wrong.argmax())
            raise DataError(
                f"document {index} has {lengths[index]} tokens, {what}. Drop or cut such documents before packing "
                "(too_long: drop, or truncate)."
            )


class _Rows:
    """Open rows, grouped by free space; place() fills them for all documents of one length at once."""

    def __init__(self, capacity: int, num_documents: int):
        self.capacity = capacity
        self.num_rows = 0
        self.row_of = np.empty(num_documents, dtype=np.int32)  # by rank: longest document first
        self.num_placed = 0
        self.free: list[int] = []  # free spaces that some open row has, ascending
        self.with_free: dict[int, deque[np.ndarray]] = {}  # free space → rows, in arrays

    def place(self, size: int, count: int) -> None:
        """Put `count` documents of `size` tokens where best-fit would put them one after another.

        The fullest row that fits takes documents until none fits any more (it stays the fullest meanwhile), then the
        next row with the same free space does.
        """
        while count:
            at = bisect_left(self.free, size)
            if at == len(self.free):
                self._place_in_new_rows(size, count)
                return
            free = self.free[at]
            rows = self.with_free[free].popleft()
            count -= self._fill(rows, free, size, count)
            if not self.with_free[free]:
                del self.with_free[free]
                del self.free[bisect_left(self.free, free)]

    def _place_in_new_rows(self, size: int, count: int) -> None:
        num_new = -(-count // (self.capacity // size))
        rows = np.arange(self.num_rows, self.num_rows + num_new, dtype=np.int32)
        self.num_rows += num_new
        self._fill(rows, self.capacity, size, count)

    def _fill(self, rows: np.ndarray, free: int, size: int, count: int) -> int:
        """Put up to `count` documents into `rows`, which all have `free` tokens left; returns how many fitted."""
        each = free // size
        num_full, rest = divmod(count, each)
        full = rows[:num_full]
        self._assign(np.repeat(full, each))
        self._keep(full, free - each * size)
        if num_full >= len(rows):
            return each * len(rows)
        if rest:
            self._assign(np.repeat(rows[num_full : num_full + 1], rest))
            self._keep(rows[num_full : num_full + 1], free - rest * size)
            num_full += 1
        self._keep(rows[num_full:], free, is_first=True)
        return count

    def _assign(self, rows: np.ndarray) -> None:
        self.row_of[self.num_placed : self.num_placed + len(rows)] = rows
        self.num_placed += len(rows)

    def _keep(self, rows: np.ndarray, free: int, is_first: bool = False) -> None:
        if not len(rows) or not free:
            return
        if free not in self.with_free:
            self.with_free[free] = deque()
            insort(self.free, free)
        if is_first:
            self.with_free[free].appendleft(rows)
        else:
            self.with_free[free].append(rows)


def pack(
    rows: "Dataset | list[dict]",
    max_length: int,
    strategy: PackingStrategy = "bfd",
    report: "Report | None" = None,
) -> "Dataset | list[dict]":
    """Join short documents into rows of at most `max_length` tokens.

    Args:
        rows: documents with `input_ids` and, if there, `labels` and `weights`, lists of equal length. Other columns
            are left out. A list of dicts comes back as a list of dicts.
        max_length: tokens per packed row.
        strategy: "bfd" keeps documents whole (best-fit decreasing); "bfd_split" first cuts those of more than
            `max_length` tokens into several; "wrapped" joins all in their order and cuts every `max_length` tokens;
            the last row is shorter. A document that is cut goes on as a new one, whose first token has nothing to be
            predicted from: `sum(map(len, packed["seq_lengths"])) - len(rows)` tokens in all. "blocks" is "wrapped"
            without a shorter last row: every row has `max_length` tokens, and the tail of all documents is left out.
        report: gets a note on that tail.

    Returns: rows with `seq_lengths` added, so that position ids restart at each document.
    Raises: DataError if a document is empty or, under "bfd", longer than `max_length`; if "blocks" would drop all.
    Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv:2404.10830.

    >>> pack([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}, {"input_ids": [5, 6]}], 4)
    [{'input_ids': [1, 2, 3, 4], 'seq_lengths': [3, 1]}, {'input_ids': [5, 6], 'seq_lengths': [2]}]
    """
    from datasets import Dataset

    if isinstance(rows, list):
        return pack(Dataset.from_list(rows), max_length, strategy, report).to_list() if rows else []
    if not len(rows):
        return rows
    columns = [name for name in TOKEN_COLUMNS if name in rows.column_names]
    table = rows.select_columns(columns).with_format("arrow")[:]
    lengths = _lengths(table)
    if strategy == "bfd":
        sequences = _best_fit(np.cumsum(lengths) - lengths, lengths, max_length)
    elif strategy == "bfd_split":
        _check_lengths(lengths, int(lengths.max()))
        sequences = _best_fit(*_cut_long(lengths, max_length), max_length)
    elif strategy in ("wrapped", "blocks"):
        _check_lengths(lengths, int(lengths.max()))
        sequences = _cut_at_row_edges(lengths, max_length)
        if strategy == "blocks":
            sequences = _whole_rows(sequences, int(lengths.sum()), max_length, report)
    else:
        raise DataError(f"unknown packing strategy '{strategy}'. Known: {', '.join(get_args(PackingStrategy))}.")
    return dataset_of(_packed_table(table, lengths, sequences))


def dataset_of(table: "pa.Table", fingerprint: str | None = None) -> "Dataset":
    """A table in memory as a dataset. Left to itself `datasets` would pickle and hash all of it for a fingerprint."""
    from datasets import Dataset
    from datasets.table import InMemoryTable

    return Dataset(InMemoryTable(table), fingerprint=fingerprint or uuid4().hex)


class _Sequences(NamedTuple):
    """The packed rows, as slices of all tokens laid end to end."""

    starts: np.ndarray
    lengths: np.ndarray
    per_row: np.ndarray


def _lengths(table: "pa.Table") -> np.ndarray:
    import pyarrow.compute as pc

    return pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)


def _best_fit(starts: np.ndarray, lengths: np.ndarray, max_length: int) -> _Sequences:
    plan = plan_packing(lengths, max_length)
    return _Sequences(starts[plan.order], lengths[plan.order], np.diff(plan.offsets))


def _cut_long(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the documents, each cut every `max_length` tokens from its own beginning."""
    num_pieces = -(-lengths // max_length)
    begins = max_length * _ranges(np.zeros_like(lengths), num_pieces)
    piece_lengths = np.minimum(max_length, np.repeat(lengths, num_pieces) - begins)
    return np.repeat(np.cumsum(lengths) - lengths, num_pieces) + begins, piece_lengths


def _cut_at_row_edges(lengths: np.ndarray, max_length: int) -> _Sequences:
    """The parts that documents fall into when all are laid end to end and cut every `max_length` tokens."""
    ends = np.cumsum(lengths)
    edges = np.append(np.arange(max_length, ends[-1], max_length), ends[-1])
    cuts = np.union1d(ends, edges)
    part_lengths = np.diff(cuts, prepend=0)
    return _Sequences(cuts - part_lengths, part_lengths, np.diff(np.searchsorted(cuts, edges) + 1, prepend=0))


def tail_note(num_tokens: int, max_length: int, what: str = "all texts together") -> str | None:
    """What blocks of exactly `max_length` tokens leave out; `None` where they leave nothing.

    Raises: DataError where there is not one block in `what`.
    """
    blocks, tail = divmod(num_tokens, max_length)
    if not blocks:
        raise DataError(
            f"{what} have {num_tokens:,} tokens, less than one block of max_length {max_length:,}. Lower max_length, "
            "or give more text."
        )
    if not tail:
        return None
    return f"{blocks:,} blocks of {max_length:,} tokens; the tail of {tail:,} tokens behind the last is left out"


def _whole_rows(sequences: _Sequences, num_tokens: int, max_length: int, report: "Report | None") -> _Sequences:
    """Without the last row, if it is shorter than the others; the report says how many tokens that leaves out."""
    note = tail_note(num_tokens, max_length)
    if note is None:
        return sequences
    if report is not None:
        report.note(note)
    last = sequences.per_row[-1]
    return _Sequences(sequences.starts[:-last], sequences.lengths[:-last], sequences.per_row[:-1])


def _packed_table(table: "pa.Table", lengths: np.ndarray, sequences: _Sequences) -> "pa.Table":
    """The token columns gathered row by row, with `seq_lengths`; in chunks, so that temporaries stay small."""
    import pyarrow as pa

    flat = {name: _flat_values(table, name, lengths) for name in table.column_names}
    last = np.cumsum(sequences.per_row)  # sequences up to and with each row
    tokens = np.cumsum(sequences.lengths)[last - 1]  # tokens up to and with each row
    chunk_of = tokens // TOKENS_PER_CHUNK
    edges = [0, *(np.flatnonzero(np.diff(chunk_of)) + 1).tolist(), len(last)]
    chunks: dict[str, list[pa.ListArray]] = {name: [] for name in (*flat, "seq_lengths")}
    for first_row, stop_row in pairwise(edges):
        first = last[first_row - 1] if first_row else 0
        part = slice(first, last[stop_row - 1])
        seq_lengths = sequences.lengths[part]
        index = _ranges(sequences.starts[part], seq_lengths)
        row_tokens = np.diff(tokens[first_row:stop_row], prepend=tokens[first_row - 1] if first_row else 0)
        for name, values in flat.items():
            chunks[name].append(list_array(values[index], row_tokens))
        chunks["seq_lengths"].append(list_array(seq_lengths.astype(np.int32), sequences.per_row[first_row:stop_row]))
    return pa.table({name: pa.chunked_array(arrays) for name, arrays in chunks.items()})


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... for each range, end to end."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])


def list_array(values: np.ndarray, lengths: np.ndarray) -> "pa.ListArray":
    """Lists of the given lengths, cut from `values`."""
    import pyarrow as pa

    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), values)


def _flat_values(table: "pa.Table", name: str, lengths: np.ndarray) -> np.ndarray:
    """All values of a list column end to end; documents without `weights` get ones."""
    import pyarrow.compute as pc

    sizes = pc.list_value_length(table[name]).to_numpy()
    is_missing = np.isnan(sizes) & (name == "weights")
    if (is_wrong := (sizes != lengths) & ~is_missing).any():
        index = int(is_wrong.argmax())
        raise DataError(
            f"document {index} has {lengths[index]} input_ids, but {np.nan_to_num(sizes[index]):g} {name}. Make them "
            "equally long."
        )
    values = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[name].chunks])
    if not is_missing.any():
        return values
    filled = np.ones(lengths.sum())
    filled[np.repeat(~is_missing, lengths)] = values
    return filled
