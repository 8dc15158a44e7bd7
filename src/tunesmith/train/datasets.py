"""Whatever a person gives as a dataset becomes token rows: tokenized, labelled, mixed, packed, and reported on."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import repeat
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset, IterableDataset, Subset

from tunesmith.data.encode import check_weighed
from tunesmith.data.mix import check_stop, places, plan_mixture, shares_of
from tunesmith.data.normalize import Example, fingerprint
from tunesmith.data.pack import TOKEN_COLUMNS, dataset_of, pack
from tunesmith.data.parallel import encode_batches, num_workers
from tunesmith.data.prepare import TOKEN_TYPES, as_dataset, batched, joined, note_duplicates
from tunesmith.data.report import Report
from tunesmith.errors import ConfigError
from tunesmith.train.batching import shuffled
from tunesmith.train.reading import Preparation, Reader, beside, check_answers, check_report, numbered, values_of
from tunesmith.train.ready import document_lengths, masks_in, ready, refitted
from tunesmith.train.streaming import (
    MixedStream,
    PackedStream,
    Stream,
    TokenStream,
    documents_of,
    warn_of_function,
)

TokenRows = datasets.Dataset | Stream
PEEKED = 100  # rows of a dataset that is left as it is


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
    documents = _documents(name, dataset, how.only_tokens() if how.packing else how, report)
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
    check_stop(how.mixture_stop)
    found = []
    for key, part in parts.items():
        label = f"{name}[{key}]"
        _check_kind(label, part)
        reports[label] = Report()
        found.append(_documents(label, part, how.only_tokens(), reports[label]))
    mixture = _mixed(name, found, shares, how)
    return packed(mixture, how, reports[f"{name}[{names[0]}]"]) if how.packing else _shuffled(mixture, how)


def packed(documents: TokenRows, how: Preparation, report: Report) -> TokenRows:
    """Documents joined into rows of at most `how.max_length` tokens; rows that are packed already stay as they are.

    Args:
        report: gets a note on what packing leaves out.
    """
    if isinstance(documents, Stream):
        return PackedStream(documents, how, report)
    if "seq_lengths" in columns_of(documents):
        return _shuffled(documents, how)
    return pack(_shuffled(documents, how), how.max_length, how.packing_strategy, report)


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
    """Refuse masks, and bounds of documents, that nobody would read."""
    columns = getattr(dataset, "column_names", None) or ()
    masks = masks_in(columns, how.train_on) if isinstance(columns, list) and not how.own_collator else []
    if masks and "labels" not in columns:
        raise ConfigError(
            f"{name} has {', '.join(masks)} but no labels, and skip_prepare_dataset leaves it as it is, so every "
            "token would be trained. Add a labels column (-100 where the loss does not count), or prepare the dataset."
        )
    is_table = isinstance(dataset, datasets.Dataset) and not how.own_collator
    if is_table and "position_ids" in columns and "seq_lengths" not in columns:
        _check_unpacked(name, dataset)


def _check_unpacked(name: str, dataset: datasets.Dataset) -> None:
    """Refuse rows whose positions tell of several documents, if there is one among the first."""
    for number, row in enumerate(dataset.with_format(None).select(range(min(PEEKED, len(dataset)))), 1):
        seen = row.get("attention_mask") or repeat(1)
        positions = [position for position, is_seen in zip(row["position_ids"] or (), seen) if is_seen]
        if all(isinstance(position, int) for position in positions) and len(document_lengths(positions)) > 1:
            raise ConfigError(
                f"{name} row {number}: its position_ids begin anew, and skip_prepare_dataset leaves it as it is, so "
                "its documents would attend to one another. Add a column seq_lengths, or prepare the dataset."
            )


def _shuffled(documents: Any, how: Preparation) -> Any:
    if not how.shuffle or isinstance(documents, Stream):  # a stream shuffles what it reads
        return documents
    if isinstance(documents, datasets.Dataset):
        return documents.shuffle(seed=how.seed)
    return Subset(documents, shuffled(len(documents), how.seed, epoch=0).tolist())


def _documents(name: str, dataset: Any, how: Preparation, report: Report) -> Any:
    """Token rows, one document each, whatever the dataset is."""
    columns = columns_of(dataset)
    _warn_of_columns(name, columns, how)
    warn_of_function(name, columns, how)
    if isinstance(dataset, IterableDataset | datasets.IterableDataset):
        function = None if "input_ids" in columns else how.formatting_func
        return TokenStream(name, dataset, replace(how, formatting_func=function), report)
    if "input_ids" in columns:
        if "weights" in columns:
            check_weighed(how.unweighed, f"{name}: ")
        if "labels" not in columns and not masks_in(columns, how.train_on):
            check_answers(how, name, "the token rows have neither labels nor masks")
        return ready(name, dataset, columns, how, report)
    return _encoded(name, dataset, how, report)


def columns_of(dataset: Any) -> list[str]:
    """The columns of the first row as the person's format or transform makes it; what a stream says of itself."""
    is_stream = isinstance(dataset, IterableDataset | datasets.IterableDataset)
    first = None if is_stream or not len(dataset) else dataset[0]
    return list(first) if isinstance(first, Mapping) else list(getattr(dataset, "column_names", None) or ())


def _warn_of_columns(name: str, columns: Iterable[str], how: Preparation) -> None:
    """Say aloud that kept columns are not for the trainer's own collators."""
    extra = [column for column in beside(columns, how) if column not in ("input_ids", "labels", "attention_mask")]
    if how.keep_columns and extra:
        warnings.warn(
            f"remove_unused_columns=False keeps the columns {', '.join(map(str, extra))} of {name} beside the tokens. "
            "The trainer's own collators leave them out of the batch; a data_collator of yours may read them.",
            UserWarning,
            stacklevel=4,
        )


# Rows to be rendered -----------------------------------------------------------------------------------------------


def _encoded(name: str, dataset: Any, how: Preparation, report: Report) -> datasets.Dataset:
    """Rows rendered and tokenized, batch by batch."""
    reader, seen, numbers, parts = Reader(how), set(), [], []
    rows = numbered(name, values_of(dataset), from_table=isinstance(dataset, datasets.Dataset))
    num_examples = 0

    def examples() -> Iterator[list[Example]]:
        nonlocal num_examples
        for batch in batched(rows, how.batch_size):
            report.read += len(batch)
            found = reader(batch, report)
            seen.update(map(fingerprint, found))
            num_examples += len(found)
            yield found

    workers = num_workers(how.num_proc, len(dataset), how.tokenizer, how.encoding)
    for part in encode_batches(examples(), how.tokenizer, how.encoding, report, workers):
        parts.append(dataset_of(part.table))
        numbers += [part.examples[index]["line"] for index in part.indexes]
    note_duplicates(report, num_examples - len(seen), num_examples)
    check_report(name, report, how.packing)
    tokens = joined(parts)
    if how.own_collator:
        tokens = _for_own_collator(tokens, reader)
    return _beside(tokens, dataset, numbers, how) if how.keep_columns else tokens


def _for_own_collator(tokens: datasets.Dataset, reader: Reader) -> datasets.Dataset:
    """As `streaming.for_own_collator`, for all rows."""
    ones = [[1] * len(ids) for ids in tokens["input_ids"]]
    tokens = tokens.remove_columns("labels") if reader.trains_all else tokens
    return tokens.add_column("attention_mask", ones, feature=datasets.List(datasets.Value("int8")))


def _beside(tokens: datasets.Dataset, dataset: Any, numbers: list[int], how: Preparation) -> datasets.Dataset:
    """The token rows with the columns of the rows that they were made of."""
    table = dataset if isinstance(dataset, datasets.Dataset) else datasets.Dataset.from_list(list(values_of(dataset)))
    table = table.with_format(None).select([number - 1 for number in numbers])
    table = table.select_columns([name for name in beside(table.column_names, how) if name not in tokens.column_names])
    return datasets.concatenate_datasets([tokens, table], axis=1) if table.column_names else tokens


# Mixtures ----------------------------------------------------------------------------------------------------------


def _mixed(name: str, parts: list[Any], shares: np.ndarray | None, how: Preparation) -> TokenRows:
    """Token rows of all parts, by their shares."""
    if any(isinstance(part, IterableDataset) for part in parts):
        streams = [
            part if isinstance(part, Stream) else TokenStream(name, part, how.only_tokens(), Report())
            for part in parts
        ]
        return MixedStream(streams, shares, how.seed, how.mixture_stop)
    tables = [_plain_rows(name, part, how) for part in parts]
    if shares is None:
        return joined(tables)
    sizes = [len(table) for table in tables]
    return joined(tables).select(places(plan_mixture(sizes, shares, how.seed, how.mixture_stop), sizes))


def _plain_rows(name: str, part: Any, how: Preparation) -> datasets.Dataset:
    """Token rows with no column that other parts lack; rows that came packed are documents again."""
    table = part if isinstance(part, datasets.Dataset) else refitted(name, part, how.only_tokens(), Report())
    if "seq_lengths" in table.column_names:
        return as_dataset([document for row in table for document in documents_of(row)])
    table = table.select_columns([column for column in TOKEN_COLUMNS if column in table.column_names])
    types = datasets.Features({column: TOKEN_TYPES[column] for column in table.column_names})
    return table if table.features == types else table.cast(types)
