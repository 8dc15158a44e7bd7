"""Rows that somebody tokenized: taken as they are, but for labels, padding, and what packing needs."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from numbers import Real
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tunesmith.data import IGNORE_INDEX
from tunesmith.data.encode import fit, own_labels
from tunesmith.data.normalize import Example
from tunesmith.data.pack import TOKEN_COLUMNS, list_array
from tunesmith.data.prepare import as_dataset, batched, joined
from tunesmith.data.report import Report
from tunesmith.data.rows import Row, RowError
from tunesmith.data.tokenize import Tokens
from tunesmith.train.reading import Preparation, check_report, numbered, values_of

MASKS = ("completion_mask", "assistant_masks")  # TRL's columns of 0 and 1 beside input_ids
ROW_COLUMNS = (*TOKEN_COLUMNS, *MASKS, "attention_mask", "position_ids", "seq_lengths")
ROWS_AT_ONCE = 1000


def ready(name: str, dataset: Any, columns: list[str], how: Preparation, report: Report) -> Any:
    """Rows with `input_ids`, as they are; labels are added where there are none.

    No row is tokenized or cut. Only what cannot be used as it is is made anew: rows to be packed, or with padding.
    """
    if (how.packing and "seq_lengths" not in columns) or how.label_with is not None:
        return refitted(name, dataset, how, report)
    is_table = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
    has_positions = "position_ids" in columns and "seq_lengths" not in columns  # which may begin anew
    is_finished = "labels" in columns and "attention_mask" not in columns and not has_positions
    if how.own_collator or (is_finished and not is_table and not isinstance(dataset, list | tuple)):
        report.read = report.kept = len(dataset)
        return dataset
    if not is_table or has_positions or not _are_whole(rows := _arrow(dataset), how.num_ids):
        return refitted(name, dataset, how, report)
    if "labels" not in columns:
        dataset = dataset.with_format(None)  # which may have hidden them
    if "labels" not in rows.column_names:
        labels = _masked_ids(rows, masks_in(rows.column_names, how.train_on))
        rows, dataset = rows.append_column("labels", labels), dataset.add_column("labels", labels)
    _count(rows, report)
    return dataset


def refitted(name: str, dataset: Any, how: Preparation, report: Report) -> datasets.Dataset:
    """The rows read one by one: without padding, and where they are packed, of lengths that can be."""
    parts, lengths, is_packed = [], [], False
    for batch in batched(numbered(name, values_of(dataset), from_table=False), ROWS_AT_ONCE):
        kept = [tokens for row in batch if (tokens := fitted(row, how, report)) is not None]
        parts.append(as_dataset(kept))
        lengths += [tokens.get("seq_lengths") or [len(tokens["input_ids"])] for tokens in kept]
        is_packed = is_packed or any("seq_lengths" in tokens for tokens in kept)
    if not report.kept:
        check_report(name, report, how.packing)
    return joined(parts).add_column("seq_lengths", lengths) if is_packed else joined(parts)


def fitted(row: Row, how: Preparation, report: Report) -> Tokens | None:
    """A row that somebody tokenized: as it is, or under packing of a length that can be packed.

    Returns: `None` for a row that is dropped; the report counts it either way.
    """
    report.read += 1
    place: Example = {"source": row.source, "line": row.line}
    try:
        tokens: Tokens | None = token_row(row, how.train_on, how.num_ids)
    except RowError as error:
        if how.on_bad_row == "error":
            raise
        report.dropped(error.reason, row, str(error))
        return None
    if not tokens["input_ids"]:
        report.dropped("no-token", row)
        return None
    if how.packing and "seq_lengths" not in tokens:
        tokens = fit(place, tokens, how.tokenizer, how.encoding, report)
    elif how.label_with is not None:
        tokens["labels"] = labels_of(tokens, lambda ids: own_labels(place, ids, how.label_with))
    if tokens is not None:
        report.kept += 1
        report.add_tokens([tokens])
    return tokens


def token_row(row: Row, train_on: str, num_ids: int | None = None) -> Tokens:
    """A row with `input_ids` as it is; labels default to the ids, less what the mask columns leave out.

    `completion_mask` counts unless `train_on` is "all". Where `attention_mask` is 0 stands padding: it is taken out.
    Where `position_ids` begin anew a document does.

    Args:
        num_ids: ids and labels are below it.

    Raises: RowError where columns are not as long as the ids, `seq_lengths` do not add up to them, or a number cannot
        be what it stands for.
    """
    try:
        return _token_row(row.value, train_on, num_ids)
    except RowError as error:
        raise error.at(row.source, row.line) from None


def _token_row(value: Mapping[str, Any], train_on: str, num_ids: int | None) -> Tokens:
    found = {name: as_list(value[name], name) for name in ROW_COLUMNS if value.get(name) is not None}
    found |= {name: whole_numbers(found[name], name) for name in found if name != "weights"}
    sizes = {name: sum(values) if name == "seq_lengths" else len(values) for name, values in found.items()}
    if "input_ids" not in found or len(set(sizes.values())) > 1:
        lengths = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise RowError(
            f"columns of one row must be equally long, found {lengths or 'none'}. Give every row input_ids, and "
            "labels or masks of the same length.",
            "unequal-columns",
        )
    _check_range(found, num_ids)
    tokens: Tokens = {"input_ids": found["input_ids"]}
    masks = [found[name] for name in masks_in(found, train_on)]
    unmasked = [id if all(bits) else IGNORE_INDEX for id, *bits in zip(found["input_ids"], *masks)]
    tokens["labels"] = found.get("labels", unmasked)
    if "weights" in found:
        tokens["weights"] = found["weights"]
    if "seq_lengths" in found:  # packed by somebody
        return tokens | {"seq_lengths": found["seq_lengths"]}
    seen, positions = found.get("attention_mask", ()), found.get("position_ids", ())
    if not all(seen):
        tokens = {name: [item for item, is_seen in zip(items, seen) if is_seen] for name, items in tokens.items()}
        positions = [position for position, is_seen in zip(positions, seen) if is_seen]
    lengths = document_lengths(positions)
    return tokens | {"seq_lengths": lengths} if len(lengths) > 1 else tokens


def document_lengths(positions: Sequence[int]) -> list[int]:
    """The lengths of documents whose positions, each from its beginning, stand end to end.

    >>> document_lengths([0, 1, 2, 0, 1])
    [3, 2]
    """
    begins = [i for i, position in enumerate(positions) if i == 0 or position != positions[i - 1] + 1]
    return [stop - first for first, stop in pairwise([*begins, len(positions)])]


def whole_numbers(values: list, column: str) -> list[int]:
    """The numbers of a row as whole ones; other programs may have written them as floats."""
    if set(map(type, values)) <= {int}:
        return values
    for number, value in enumerate(values, 1):
        if not isinstance(value, Real) or not math.isfinite(value) or value != int(value):
            raise RowError(
                f"{column} hold {value!r} at token {number}, and must be whole numbers. Mend them, or leave the row "
                "out.",
                "bad-tokens",
            )
    return [int(value) for value in values]


def _check_range(found: Mapping[str, list[int]], num_ids: int | None) -> None:
    limit = math.inf if num_ids is None else num_ids
    for name, ignored in (("input_ids", set()), ("labels", {IGNORE_INDEX})):
        strange = {id for id in set(found.get(name, ())) - ignored if not 0 <= id < limit}
        if strange:
            number, id = next((number, id) for number, id in enumerate(found[name], 1) if id in strange)
            known = "from 0 on" if num_ids is None else f"from 0 to {num_ids - 1}"
            beside = f", or {IGNORE_INDEX} where nothing is trained" if name == "labels" else ""
            raise RowError(
                f"{name} hold {id} at token {number}, and must be tokens of the model, {known}{beside}. Take the "
                "tokenizer of this model, or mend the row.",
                "bad-tokens",
            )


def masks_in(columns: Mapping[str, Any] | Sequence[str], train_on: str) -> list[str]:
    """The mask columns that count."""
    return [name for name in MASKS if name in columns and not (name == "completion_mask" and train_on == "all")]


def as_list(values: Any, column: str) -> list:
    """A row's numbers as a list; tokenizers asked for tensors put a dimension of 1 in front."""
    numbers = values.tolist() if hasattr(values, "tolist") else list(values)
    nested = bool(numbers) and hasattr(numbers[0], "__len__")
    if nested and len(numbers) > 1:
        raise RowError(f"{column} of one row holds {len(numbers)} lists. Give one row at a time, a list of numbers.")
    return as_list(numbers[0], column) if nested else numbers


def labels_of(tokens: Tokens, label_with: Callable[[list[int]], list[int]]) -> list[int]:
    """Labels made document by document; a packed row holds several."""
    edges = accumulate(tokens.get("seq_lengths") or [len(tokens["input_ids"])], initial=0)
    return [label for first, stop in pairwise(edges) for label in label_with(tokens["input_ids"][first:stop])]


def _arrow(dataset: datasets.Dataset) -> pa.Table:
    """The columns that count, whichever the person's format shows."""
    dataset = dataset.with_format("arrow")
    return dataset.select_columns([name for name in ROW_COLUMNS if name in dataset.column_names])[:]


def _are_whole(rows: pa.Table, num_ids: int | None) -> bool:
    """Whether every row has tokens of the model and no padding, and all its columns are of its length."""
    if not len(rows) or any(one.null_count or pa.types.is_nested(one.type.value_type) for one in rows.columns):
        return False
    if not all(_are_numbers(name, rows[name]) for name in rows.column_names):
        return False
    lengths = _lengths(rows["input_ids"])
    sizes = [_sums(rows[name]) if name == "seq_lengths" else _lengths(rows[name]) for name in rows.column_names]
    if not lengths.all() or not all(np.array_equal(size, lengths) for size in sizes):
        return False
    if not all(
        _are_tokens(name, rows[name], num_ids) for name in rows.column_names if name in ("input_ids", "labels")
    ):
        return False
    seen = rows["attention_mask"].chunks if "attention_mask" in rows.column_names else ()
    return all(pc.all(pc.cast(chunk.flatten(), pa.bool_())).as_py() for chunk in seen)


def _are_numbers(name: str, lists: pa.ChunkedArray) -> bool:
    """Whether a column holds what it should, and no null; weights are no whole numbers."""
    kind = lists.type.value_type
    is_whole = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or name == "weights"
    return is_whole and not any(chunk.flatten().null_count for chunk in lists.chunks)


def _are_tokens(name: str, lists: pa.ChunkedArray, num_ids: int | None) -> bool:
    for chunk in lists.chunks:
        ids = chunk.flatten().to_numpy(zero_copy_only=False)
        strange = (ids < 0) if num_ids is None else (ids < 0) | (ids >= num_ids)
        if (strange & (ids != IGNORE_INDEX) if name == "labels" else strange).any():
            return False
    return True


def _flat(lists: pa.ChunkedArray) -> np.ndarray:
    return np.concatenate([chunk.flatten().to_numpy() for chunk in lists.chunks])


def _sums(lists: pa.ChunkedArray) -> np.ndarray:
    """The sum of each list."""
    return np.diff(np.append(0, np.cumsum(_flat(lists)))[np.cumsum(_lengths(lists))], prepend=0)


def _lengths(lists: Any) -> np.ndarray:
    return pc.list_value_length(lists).to_numpy()


def _masked_ids(rows: pa.Table, masks: list[str]) -> pa.ChunkedArray:
    """The ids, less what the masks leave out."""
    chunks = []
    for batch in rows.to_batches():
        ids = batch["input_ids"].flatten().to_numpy(zero_copy_only=False).astype(np.int64)
        for name in masks:
            ids[~batch[name].flatten().to_numpy(zero_copy_only=False).astype(bool)] = IGNORE_INDEX
        chunks.append(list_array(ids, _lengths(batch["input_ids"])))
    return pa.chunked_array(chunks)


def _count(rows: pa.Table, report: Report) -> None:
    """Rows, their lengths and trained tokens, without a Python object for each token."""
    report.read = report.kept = len(rows)
    report.lengths = _lengths(rows["input_ids"]).tolist()
    report.num_tokens = sum(report.lengths)
    trained = _flat(rows["labels"]) != IGNORE_INDEX
    sizes = _flat(rows["seq_lengths"]) if "seq_lengths" in rows.column_names else _lengths(rows["input_ids"])
    sizes = sizes[sizes > 0]
    trained[np.cumsum(sizes) - sizes] = False  # the first of each document, as `report.count_trained`
    report.num_trained = int(trained.sum())
