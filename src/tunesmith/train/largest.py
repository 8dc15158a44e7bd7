"""The largest micro-batch of a run, known beforehand: the order of rows is drawn from (seed, epoch) alone."""

import math
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from tunesmith.data import IGNORE_INDEX
from tunesmith.train.loaders import epoch_sampler
from tunesmith.train.memory import Batch
from tunesmith.train.options import SFTConfig

DRAWS = 5_000_000
"""Rows that are drawn to find it, in half a second or so: of a longer run the first epochs stand for all."""


def largest_batch(dataset: Any, args: SFTConfig, *, drawn: bool = True) -> Batch:
    """The largest micro-batch that will come up; all its tokens count as trained where rows do not tell.

    Args:
        dataset: the training set; of a stream, or of rows that are not packed yet, `args` tell the bound.
        drawn: `loaders.epoch_sampler` draws the batches; otherwise they may hold the longest rows, all at once.
    """
    if args.tokens_per_batch is not None:
        return Batch(args.tokens_per_batch, args.tokens_per_batch)
    size = args.per_device_train_batch_size
    if not isinstance(dataset, datasets.Dataset) or "input_ids" not in dataset.column_names:
        tokens = size * (args.max_length or 1024)
        return Batch(tokens, tokens)
    if args.packing and args.max_length and "seq_lengths" not in dataset.column_names:  # they will be packed
        return Batch(size * args.max_length, size * args.max_length)
    ids = dataset.select_columns(["input_ids"]).with_format("arrow")[:]["input_ids"]
    lengths, padded = pc.list_value_length(ids).to_numpy(), args.padding_free is False
    rows = largest_rows(lengths, args, dataset=dataset if drawn else None, padded=padded)
    tokens = len(rows) * int(lengths[rows].max(initial=0)) if padded else int(lengths[rows].sum())
    documents = () if padded else document_lengths(dataset, lengths, rows)
    if "labels" not in dataset.column_names:
        return Batch(tokens, tokens, documents)
    labels = dataset.select_columns(["labels"]).with_format(None).select(rows.tolist())["labels"]
    return Batch(tokens, sum(label != IGNORE_INDEX for row in labels for label in row), documents)


def largest_rows(lengths: np.ndarray, args: SFTConfig, *, dataset: Any = None, padded: bool = False) -> np.ndarray:
    """The rows, of `lengths` tokens, of the micro-batch with the most tokens, padding counted where it is `padded`.

    Without the `dataset` from which they are drawn: the longest ones.
    """
    size = args.per_device_train_batch_size
    largest, most = lengths.argsort(kind="stable")[::-1][:size], 0
    if dataset is None or args.train_sampling_strategy == "batch_rebalance" or not len(lengths):
        return largest
    for order in orders(dataset, args):
        begins = np.arange(0, len(order), size)
        counts = np.minimum(size, len(order) - begins)
        tokens = counts * np.maximum.reduceat(lengths[order], begins) if padded else None
        tokens = np.add.reduceat(lengths[order], begins, dtype=np.int64) if tokens is None else tokens
        if tokens.max() > most:
            most, begin = tokens.max(), begins[tokens.argmax()]
            largest = order[begin : begin + size]
    return largest


def orders(dataset: Any, args: SFTConfig) -> Iterator[np.ndarray]:
    """The rows of each epoch of the run in their order, as many epochs as `DRAWS` allows and one at least.

    Each process's batches are runs of `per_device_train_batch_size` rows of it, but for a smaller last one.
    """
    sampler = epoch_sampler(dataset, args, args.per_device_train_batch_size)
    epochs = 1 if args.train_sampling_strategy == "sequential" else epochs_of(len(sampler), args)
    for epoch in range(max(1, min(epochs, DRAWS // len(sampler)))):
        sampler.set_epoch(epoch)
        yield np.fromiter(sampler, dtype=np.int64, count=len(sampler))


def epochs_of(rows: int, args: SFTConfig) -> int:
    """Times that the run begins to read its rows."""
    if args.max_steps <= 0:
        return math.ceil(args.num_train_epochs)
    a_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    return math.ceil(args.max_steps / math.ceil(rows / a_step))


def document_lengths(dataset: datasets.Dataset, lengths: np.ndarray, rows: np.ndarray) -> tuple[int, ...]:
    """Tokens of each document of these rows: of each row, or of each that a packed one holds."""
    if "seq_lengths" not in dataset.column_names:
        return tuple(lengths[rows].tolist())
    packed = dataset.select_columns(["seq_lengths"]).with_format(None).select(rows.tolist())["seq_lengths"]
    return tuple(length for row in packed for length in row)
