"""Rows that somebody tokenized: taken as they are, but for labels, padding, and what packing needs."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tunesmith.data import IGNORE_INDEX
from tunesmith.data.encode import fit
from tunesmith.data.pack import TOKEN_COLUMNS
from tunesmith.data.prepare import as_dataset, batched, joined
from tunesmith.data.report import Report
from tunesmith.data.rows import Row
from tunesmith.data.tokenize import Tokens
from tunesmith.errors import DataError
from tunesmith.train.reading import Preparation, check_report, numbered, values_of

MASKS = ("completion_mask", "assistant_masks")  # TRL's columns of 0 and 1 beside input_ids
ROW_COLUMNS = (*TOKEN_COLUMNS, *MASKS, "attention_mask")
ROWS_AT_ONCE = 1000


def ready(name: str, dataset: Any, columns: list[str], how: Preparation, report: Report) -> Any:
    """Rows with `input_ids`, as they are; labels are added where there are none.

    No row is tokenized or cut. Only what cannot be used as it is is made anew: rows to be packed, or with padding.
    """
    if (how.packing and "seq_lengths" not in columns) or how.label_with is not None:
        return refitted(name, dataset, how, report)
    report.read = report.kept = len(dataset)
    if how.own_collator:
        return dataset
    is_table = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
    if not is_table:
        finished = "labels" in columns and "attention_mask" not in columns and not isinstance(dataset, list | tuple)
        return dataset if finished else refitted(name, dataset, how, report)
    table = dataset.with_format("arrow")
    if "attention_mask" in columns and not _is_all_true(table, "attention_mask"):
        return refitted(name, dataset, how, report)
    if "labels" not in columns:
        labels = _labels(table, masks_in(columns, how.train_on))
        dataset = dataset.with_format(None).add_column("labels", labels)
    _count_tokens(dataset, report)
    return dataset


def refitted(name: str, dataset: Any, how: Preparation, report: Report) -> datasets.Dataset:
    """The rows read one by one: without padding, and where they are packed, of lengths that can be."""
    report.read = report.kept = 0
    parts, packed_lengths = [], []
    for batch in batched(numbered(name, values_of(dataset), from_table=False), ROWS_AT_ONCE):
        kept = []
        for row in batch:
            tokens = fitted(token_row(row, how.train_on), row, how, report)
            kept += [] if tokens is None else [tokens]
        report.read += len(batch)
        report.kept += len(kept)
        report.add_tokens(kept)
        parts.append(as_dataset(kept))
        packed_lengths += [tokens["seq_lengths"] for tokens in kept if "seq_lengths" in tokens]
    if how.packing:
        check_report(report, how.packing)
    rows = joined(parts)
    return rows.add_column("seq_lengths", packed_lengths) if packed_lengths else rows


def token_row(row: Row, train_on: str) -> Tokens:
    """A row with `input_ids` as it is; labels default to the ids, less what the mask columns leave out.

    `completion_mask` counts unless `train_on` is "all". Where `attention_mask` is 0 stands padding: it is taken out.

    Raises: DataError where columns are not as long as the ids.
    """
    found = {name: as_list(row.value[name]) for name in ROW_COLUMNS if row.value.get(name) is not None}
    if "input_ids" not in found or any(len(values) != len(found["input_ids"]) for values in found.values()):
        lengths = ", ".join(f"{name} {len(values)}" for name, values in found.items())
        raise DataError(
            f"{row.source} row {row.line}: columns of one row must be equally long, found {lengths or 'none'}. Give "
            "every row input_ids, and labels or masks of the same length."
        )
    tokens: Tokens = {"input_ids": found["input_ids"]}
    masks = [found[name] for name in masks_in(found, train_on)]
    unmasked = [id if all(bits) else IGNORE_INDEX for id, *bits in zip(found["input_ids"], *masks)]
    tokens["labels"] = found.get("labels", unmasked)
    if "weights" in found:
        tokens["weights"] = found["weights"]
    if row.value.get("seq_lengths") is not None:  # packed by somebody
        return tokens | {"seq_lengths": as_list(row.value["seq_lengths"])}
    seen = found.get("attention_mask", ())
    if not all(seen):
        tokens = {name: [item for item, is_seen in zip(items, seen) if is_seen] for name, items in tokens.items()}
    return tokens


def masks_in(columns: Mapping[str, Any] | Sequence[str], train_on: str) -> list[str]:
    """The mask columns that count."""
    return [name for name in MASKS if name in columns and not (name == "completion_mask" and train_on == "all")]


def as_list(values: Any) -> list:
    """A list, whether it comes as list, array or tensor."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def fitted(tokens: Tokens, row: Row, how: Preparation, report: Report) -> Tokens | None:
    """The tokens of a row that somebody tokenized: as they are, or under packing of a length that can be packed."""
    if not how.packing or "seq_lengths" in tokens:
        return tokens if how.label_with is None else {**tokens, "labels": labels_of(tokens, how.label_with)}
    if not tokens["input_ids"]:
        report.dropped("no-token", row)
        return None
    return fit({"source": row.source, "line": row.line}, tokens, how.tokenizer, how.encoding, report)


def labels_of(tokens: Tokens, label_with: Callable[[list[int]], list[int]]) -> list[int]:
    """Labels made document by document; a packed row holds several."""
    edges = accumulate(tokens.get("seq_lengths") or [len(tokens["input_ids"])], initial=0)
    return [label for first, stop in pairwise(edges) for label in label_with(tokens["input_ids"][first:stop])]


def _is_all_true(table: datasets.Dataset, name: str) -> bool:
    chunks = table.select_columns([name])[:][name].chunks
    return all(pc.all(pc.cast(chunk.flatten(), pa.bool_())).as_py() is not False for chunk in chunks)


def _labels(table: datasets.Dataset, masks: list[str]) -> Any:
    """The ids, less what the masks leave out."""
    columns = table.select_columns(["input_ids", *masks])[:]
    ids = columns["input_ids"]
    if not masks or not len(table):
        return ids
    ids = ids.combine_chunks()
    flat = ids.flatten().to_numpy(zero_copy_only=False).copy()
    for name in masks:
        kept = columns[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        if len(kept) != len(flat):
            raise DataError(
                f"column '{name}' has {len(kept)} values for {len(flat)} input_ids. Make them equally long."
            )
        flat[~kept.astype(bool)] = IGNORE_INDEX
    lengths = pc.list_value_length(ids).to_numpy()
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), flat)


def _count_tokens(dataset: datasets.Dataset, report: Report) -> None:
    """Lengths and trained tokens, without a Python object for each token."""
    if not len(dataset):
        return
    table = dataset.with_format("arrow").select_columns(["input_ids", "labels"])[:]
    report.lengths = pc.list_value_length(table["input_ids"]).to_pylist()
    report.num_tokens = sum(report.lengths)
    report.num_trained = sum(
        pc.sum(pc.not_equal(chunk.flatten(), IGNORE_INDEX)).as_py() or 0 for chunk in table["labels"].chunks
    )
