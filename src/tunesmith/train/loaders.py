"""DataLoaders over token rows: this process's batches, exactly once each, in an order drawn from (seed, epoch)."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import datasets
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import TrainingArguments
from transformers.trainer_utils import seed_worker

from tunesmith.data.prepare import batched
from tunesmith.errors import ConfigError
from tunesmith.train.batching import EpochSampler, LengthGroupedSampler, RankBatches, TokenBudgetBatches
from tunesmith.train.options import SFTConfig


def train_batches(dataset: Any, args: SFTConfig, batch_size: int) -> Sampler[list[int]]:
    """This process's micro-batches of a training set, of `batch_size` rows or of `args.tokens_per_batch` tokens.

    Raises: ConfigError where `dataloader_drop_last` would leave none.
    """
    where = {"rank": args.process_index, "ranks": args.world_size}
    if args.tokens_per_batch is not None:
        shuffle = args.train_sampling_strategy != "sequential"
        lengths = row_lengths(dataset, args)
        return TokenBudgetBatches(lengths, args.tokens_per_batch, seed_of(args), shuffle=shuffle, **where)
    sampler = epoch_sampler(dataset, args, batch_size)
    batches = RankBatches(sampler, batch_size, drop_last=args.dataloader_drop_last, **where)
    if len(dataset) and not len(batches):
        raise ConfigError(
            f"dataloader_drop_last: {len(dataset)} rows are fewer than the {batch_size * args.world_size} of one "
            "batch, so nothing would be trained. Remove it, or lower per_device_train_batch_size."
        )
    return batches


def eval_batches(dataset: Any, args: SFTConfig) -> Sampler[list[int]]:
    """This process's micro-batches of an evaluation set, in the order of its rows."""
    sampler = EpochSampler(len(dataset), seed=0, shuffle=False)
    return RankBatches(sampler, args.eval_batch_size, rank=args.process_index, ranks=args.world_size)


def epoch_sampler(dataset: Any, args: SFTConfig, batch_size: int) -> EpochSampler:
    """The rows in the order that `train_sampling_strategy` asks for, drawn from (seed, epoch)."""
    if args.train_sampling_strategy == "group_by_length":
        size = batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthGroupedSampler(row_lengths(dataset, args), size, seed_of(args))
    return EpochSampler(len(dataset), seed_of(args), shuffle=args.train_sampling_strategy != "sequential")


def seed_of(args: SFTConfig) -> int:
    """What the order of rows is drawn from."""
    return args.seed if args.data_seed is None else args.data_seed


def row_lengths(dataset: Any, args: SFTConfig) -> list[int]:
    """Tokens of each row, of a pair those of both answers, or what a column says of it."""
    if isinstance(dataset, datasets.Dataset):
        if args.length_column_name in dataset.column_names:
            return list(dataset[args.length_column_name])
        if "input_ids" in dataset.column_names:
            return [len(ids) for ids in dataset["input_ids"]]
        sides = [dataset[name] for name in dataset.column_names if name.endswith("_input_ids")]
        return [sum(map(len, ids)) for ids in zip(*sides)]
    return [len(row["input_ids"]) for row in dataset]


def loader(dataset: Any, batches: Sampler[list[int]], collate: Callable, args: TrainingArguments) -> DataLoader:
    """A DataLoader whose batches are on the device; `batches` has been shared out among processes already."""
    made = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, **workers(args))
    return prepare_data_loader(made, args.device, num_processes=1, process_index=0, **to_device(args))


def stream_loader(dataset: IterableDataset, batch_size: int, collate: Callable, args: TrainingArguments) -> DataLoader:
    """The same for rows that come one by one: each process reads all of them and takes its share of every batch."""
    made = DataLoader(dataset, batch_size=batch_size, collate_fn=collate, **workers(args))
    return prepare_data_loader(
        made,
        args.device,
        num_processes=args.world_size,
        process_index=args.process_index,
        **to_device(args),
        dispatch_batches=False,  # a flat batch cannot be cut into equal parts
    )


def eval_stream_loader(dataset: IterableDataset, collate: Callable, args: TrainingArguments) -> DataLoader:
    """A stream's rows, each once: accelerate would fill the last batch with rows that have been counted already."""
    if args.world_size == 1:
        return stream_loader(dataset, args.eval_batch_size, collate, args)
    shares = RankShares(dataset, args.eval_batch_size, rank=args.process_index, ranks=args.world_size)
    made = DataLoader(shares, batch_size=None, collate_fn=collate, **workers(args))
    alone = {"num_processes": 1, "process_index": 0, "dispatch_batches": False}
    return prepare_data_loader(made, args.device, **to_device(args), **alone)


class RankShares(IterableDataset):
    """This process's part of each global batch of a stream, as `RankBatches` shares out rows that can be counted."""

    def __init__(self, rows: Iterable[Any], batch_size: int, *, rank: int, ranks: int):
        self.rows, self.batch_size, self.rank, self.ranks = rows, batch_size, rank, ranks

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in batched(self.rows, self.batch_size * self.ranks):
            first, stop = (len(batch) * rank // self.ranks for rank in (self.rank, self.rank + 1))
            yield batch[first:stop]


def to_device(args: TrainingArguments) -> dict[str, Any]:
    """How batches come to the device: without waiting for it where they are in pinned memory.

    A copy that waits lets the device finish all it was told, and then stand still while the next batch is collated.
    """
    return {"put_on_device": True, "non_blocking": workers(args)["pin_memory"]}


def workers(args: TrainingArguments) -> dict[str, Any]:
    """DataLoader arguments that say who reads."""
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory and args.device.type == "cuda",
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "worker_init_fn": partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    }
