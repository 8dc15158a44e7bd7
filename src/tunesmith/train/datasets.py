"""Whatever a person gives as a dataset becomes token rows: tokenized, labelled, mixed, packed, and reported on."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Dataset, IterableDataset

from tunesmith.data import IGNORE_INDEX
from tunesmith.data.encode import encode_batches
from tunesmith.data.mix import plan_mixture, shares_of
from tunesmith.data.normalize import Example, fingerprint
from tunesmith.data.pack import TOKEN_COLUMNS, pack
from tunesmith.data.prepare import TOKEN_TYPES, as_dataset, batched, joined, note_duplicates
from tunesmith.data.report import Report
from tunesmith.data.rows import Row
from tunesmith.errors import ConfigError, DataError
from tunesmith.train.reading import Preparation, Reader, masks_in, numbered, token_row
from tunesmith.train.streaming import (
    NOT_PACKED,
    MixedStream,
    PackedStream,
    Stream,
    TokenStream,
    documents_of,
    fitted,
    warn_of_function,
)

TokenRows = datasets.Dataset | Stream
ROWS_AT_ONCE = 1000


def prepared(name: str, dataset: Any, how: Preparation, report: Report) -> Any:
    """The dataset as token rows, ready for a collator.

    Args:
        name: what errors call it, such as `train_dataset`.
        dataset: a `datasets.Dataset`, a list of dicts or a torch `Dataset` of them, or a stream of them
            (`datasets.IterableDataset`, torch `IterableDataset`). Rows with `input_ids` are taken as they are, and
            packed only if `how.packing`.
        how: the options; with `how.skip` the dataset itself comes back.
        report: what became of each row; for a stream it is filled while rows are read.

    Returns: a `datasets.Dataset` (a torch `Dataset` of finished rows as it is), or a torch `IterableDataset`.
    Raises: ConfigError for something that is no dataset, DataError for rows that cannot be used or if none is left.
    """
    if how.skip:
        _check_labelled(name, dataset, how)
        return dataset
    _check_kind(name, dataset)
    if yields_tokens(dataset):
        return dataset
    documents = _documents(name, dataset, how, report)
    return packed(documents, how, report) if how.packing else _shuffled(documents, how)


def prepared_mixture(name: str, parts: Mapping[str, Any], how: Preparation, reports: dict[str, Report]) -> TokenRows:
    """Several datasets, each in its own format, as one: token rows interleaved by `how.mixture_weights`, then packed.

    Args:
        parts: by name; as in `prepared`. With a stream among them the mixture is a stream.
        reports: gets the report of each part, as `name[part]`.

    Raises: as `prepared`, and ConfigError for weights that do not fit the parts.
    """
    if how.skip:
        raise ConfigError(f"{name}: skip_prepare_dataset leaves nothing to mix. Give one dataset, see mix_datasets.")
    names = list(parts)
    shares = None if how.mixture_weights is None else shares_of(how.mixture_weights, names)
    if how.mixture_stop not in ("first", "all"):
        raise ConfigError(f"dataset_kwargs: mixture_stop is 'first' or 'all', not {how.mixture_stop!r}.")
    found = []
    for key, part in parts.items():
        label = f"{name}[{key}]"
        _check_kind(label, part)
        reports[label] = Report()
        found.append(_documents(label, part, how.of_part(), reports[label]))
    mixture = _mixed(name, found, shares, how)
    return packed(mixture, how, Report()) if how.packing else _shuffled(mixture, how)


def packed(documents: TokenRows | Any, how: Preparation, report: Report) -> TokenRows:
    """Documents joined into rows of at most `how.max_length` tokens; rows that are packed already stay as they are.

    Raises: DataError if there is no document at all.
    """
    if isinstance(documents, Stream):
        return PackedStream(documents, how)
    if "seq_lengths" in documents.column_names:
        return documents
    if not len(documents):
        raise DataError(f"{NOT_PACKED} {report.read} rows were read and {report.kept} kept.")
    return pack(_shuffled(documents, how), how.max_length, how.packing_strategy)


def yields_tokens(dataset: Any) -> bool:
    """Whether a torch stream says that its rows are finished (`ConstantLengthDataset` does)."""
    return isinstance(dataset, IterableDataset) and getattr(dataset, "yields_tokens", False)


def _check_kind(name: str, dataset: Any) -> None:
    """Refuse what is no dataset with what to do about it."""
    if isinstance(dataset, Mapping):
        keys = ", ".join(map(str, list(dataset)[:6]))
        first = next(iter(dataset), "train")
        raise ConfigError(f"{name} is a dict of datasets ({keys}). Pick a split: dataset[{first!r}].")
    if isinstance(dataset, datasets.Dataset | Dataset | list | tuple):  # torch streams are torch Datasets, too
        return
    if isinstance(dataset, datasets.IterableDataset):
        return
    hint = "Load it first: datasets.load_dataset(...)." if isinstance(dataset, str) else ""
    if type(dataset).__name__ == "DataFrame":
        hint = "Convert it: datasets.Dataset.from_pandas(...)."
    raise ConfigError(
        f"{name} is a {type(dataset).__name__}; expected a datasets.Dataset or IterableDataset, a torch Dataset, or a "
        f"list of dicts. {hint}".rstrip()
    )


def _check_labelled(name: str, dataset: Any, how: Preparation) -> None:
    """Refuse masks that nobody would read."""
    columns = getattr(dataset, "column_names", None) or ()
    masks = masks_in(columns, how.train_on) if isinstance(columns, list) and not how.own_collator else []
    if masks and "labels" not in columns:
        raise ConfigError(
            f"{name} has {', '.join(masks)} but no labels, and skip_prepare_dataset leaves it as it is, so every token "
            "would be trained. Add a labels column (-100 where the loss does not count), or prepare the dataset."
        )


def _shuffled(documents: Any, how: Preparation) -> Any:
    return documents.shuffle(seed=how.seed) if how.shuffle and isinstance(documents, datasets.Dataset) else documents


def _documents(name: str, dataset: Any, how: Preparation, report: Report) -> Any:
    """Token rows, one document each, whatever the dataset is."""
    if isinstance(dataset, IterableDataset | datasets.IterableDataset):
        columns = getattr(dataset, "column_names", None) or ()
        _warn_of_columns(name, columns, how)
        warn_of_function(name, columns, how)
        function = None if "input_ids" in columns else how.formatting_func
        how = replace(how, keep_columns=how.keep_columns and not how.packing, formatting_func=function)
        return TokenStream(name, dataset, how, report)
    columns = columns_of(dataset)
    _warn_of_columns(name, columns, how)
    warn_of_function(name, columns, how)
    if "input_ids" in columns:
        return _ready(name, dataset, columns, how, report)
    return _encoded(name, dataset, columns, how, report)


def columns_of(dataset: Any) -> list[str]:
    """The columns of the first row, which is as the person's format or transform makes it."""
    first = dataset[0] if len(dataset) else None
    return list(first) if isinstance(first, Mapping) else list(getattr(dataset, "column_names", None) or ())


def _warn_of_columns(name: str, columns: Iterable[str], how: Preparation) -> None:
    """Say aloud that kept columns are not for the trainer's own collators."""
    extra = [column for column in columns if column not in ("input_ids", "labels", "attention_mask")]
    if how.keep_columns and extra and not how.packing:
        warnings.warn(
            f"remove_unused_columns=False keeps the columns {', '.join(map(str, extra))} of {name} beside the tokens. "
            "The trainer's own collators leave them out of the batch; a data_collator of yours may read them.",
            UserWarning,
            stacklevel=4,
        )


# Rows to be rendered -----------------------------------------------------------------------------------------------


def _encoded(name: str, dataset: Any, columns: list[str], how: Preparation, report: Report) -> datasets.Dataset:
    """Rows rendered and tokenized, batch by batch."""
    reader, seen, numbers, parts = Reader(how), set(), [], []
    rows = numbered(name, _values(dataset), from_table=isinstance(dataset, datasets.Dataset))
    num_examples = 0

    def examples() -> Iterator[list[Example]]:
        nonlocal num_examples
        for batch in batched(rows, how.batch_size):
            report.read += len(batch)
            found = reader(batch, report)
            seen.update(map(fingerprint, found))
            num_examples += len(found)
            yield found

    for batch, encoded in encode_batches(examples(), how.tokenizer, how.encoding, report, how.num_proc):
        parts.append(as_dataset([tokens for _, tokens in encoded]))
        numbers += [batch[index]["line"] for index, _ in encoded]
    note_duplicates(report, num_examples - len(seen), num_examples)
    if how.packing and not report.kept:
        reasons = {problem.reason for problem in report.drops}
        dropped = f" All {report.read} rows were dropped: {', '.join(sorted(reasons))}." if reasons else ""
        raise DataError(f"{NOT_PACKED}{dropped or ' There are no rows.'}")
    report.check(max_drop_ratio=1.0)
    tokens = joined(parts)
    if how.own_collator and not how.packing:
        tokens = _for_own_collator(tokens, reader)
    return _beside(tokens, dataset, numbers) if how.keep_columns and not how.packing else tokens


def _values(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """The rows as plain values; a transform of the person's is applied, a format for tensors is not."""
    if not isinstance(dataset, datasets.Dataset):
        return (dataset[index] for index in range(len(dataset)))
    return iter(dataset if dataset.format["type"] == "custom" else dataset.with_format(None))


def _for_own_collator(tokens: datasets.Dataset, reader: Reader) -> datasets.Dataset:
    """As `streaming.for_own_collator`, for all rows."""
    ones = [[1] * len(ids) for ids in tokens["input_ids"]]
    tokens = tokens.remove_columns("labels") if reader.trains_all else tokens
    return tokens.add_column("attention_mask", ones, feature=datasets.List(datasets.Value("int8")))


def _beside(tokens: datasets.Dataset, dataset: Any, numbers: list[int]) -> datasets.Dataset:
    """The token rows with the columns of the rows that they were made of."""
    table = dataset if isinstance(dataset, datasets.Dataset) else datasets.Dataset.from_list(list(_values(dataset)))
    table = table.with_format(None).select([number - 1 for number in numbers])
    table = table.remove_columns([name for name in table.column_names if name in tokens.column_names])
    return datasets.concatenate_datasets([tokens, table], axis=1) if table.column_names else tokens


# Rows that somebody tokenized --------------------------------------------------------------------------------------


def _ready(name: str, dataset: Any, columns: list[str], how: Preparation, report: Report) -> Any:
    """Rows with `input_ids`, as they are; labels are added where there are none.

    No row is tokenized or cut. Only what cannot be used as it is is made anew: rows to be packed, or with padding.
    """
    if how.packing and "seq_lengths" not in columns:
        return _refitted(name, dataset, how, report)
    report.read = report.kept = len(dataset)
    if how.own_collator:
        return dataset
    is_table = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
    if not is_table:
        finished = "labels" in columns and "attention_mask" not in columns and not isinstance(dataset, list | tuple)
        return dataset if finished else _refitted(name, dataset, how, report)
    table = dataset.with_format("arrow")
    if "attention_mask" in columns and not _is_all_true(table, "attention_mask"):
        return _refitted(name, dataset, how, report)
    if "labels" not in columns:
        labels = _labels(table, masks_in(columns, how.train_on))
        dataset = dataset.with_format(None).add_column("labels", labels)
    _count_tokens(dataset, report)
    report.check(max_drop_ratio=1.0)
    return dataset


def _refitted(name: str, dataset: Any, how: Preparation, report: Report) -> datasets.Dataset:
    """The rows read one by one: without padding, and where they are packed, of lengths that can be."""
    report.read = report.kept = 0
    parts, packed_lengths = [], []
    for batch in batched(numbered(name, _values(dataset), from_table=False), ROWS_AT_ONCE):
        kept = []
        for row in batch:
            tokens = fitted(_token_row(row, how), row, how, report)
            kept += [] if tokens is None else [tokens]
        report.read += len(batch)
        report.kept += len(kept)
        report.add_tokens(kept)
        parts.append(as_dataset(kept))
        packed_lengths += [tokens["seq_lengths"] for tokens in kept if "seq_lengths" in tokens]
    if not how.packing:
        report.check(max_drop_ratio=1.0)
    rows = joined(parts)
    return rows.add_column("seq_lengths", packed_lengths) if packed_lengths else rows


def _token_row(row: Row, how: Preparation) -> Any:
    try:
        return token_row(row.value, how.train_on)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{row.source} row {row.line}: its columns do not fit together ({error}). Give every row input_ids, and "
            "labels or masks of the same length."
        ) from error


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


# Mixtures ----------------------------------------------------------------------------------------------------------


def _mixed(name: str, parts: list[Any], shares: np.ndarray | None, how: Preparation) -> TokenRows:
    """Token rows of all parts, by their shares."""
    if any(isinstance(part, IterableDataset) for part in parts):
        streams = [
            part if isinstance(part, Stream) else TokenStream(name, part, how.of_part(), Report()) for part in parts
        ]
        return MixedStream(streams, shares, how.seed, how.mixture_stop)
    tables = [_plain_rows(name, part, how) for part in parts]
    sizes = [len(table) for table in tables]
    whole = joined(tables)
    if shares is None:
        return whole
    plan = plan_mixture(sizes, shares, how.seed, how.mixture_stop)
    return whole.select((np.cumsum(sizes) - sizes)[plan[:, 0]] + plan[:, 1])


def _plain_rows(name: str, part: Any, how: Preparation) -> datasets.Dataset:
    """Token rows with no column that other parts lack; rows that came packed are documents again."""
    table = part if isinstance(part, datasets.Dataset) else _refitted(name, part, how.of_part(), Report())
    if "seq_lengths" in table.column_names:
        return as_dataset([document for row in table for document in documents_of(row)])
    table = table.select_columns([column for column in TOKEN_COLUMNS if column in table.column_names])
    return table.cast(datasets.Features({column: TOKEN_TYPES[column] for column in table.column_names}))
