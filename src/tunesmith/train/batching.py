"""Which rows make a batch, in which order, on which process: drawn from (seed, epoch) alone.

A resumed run sees the same rows; several processes share out each batch so that every row is used exactly once.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from tunesmith.data.pack import plan_packing


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `range(count)` that depends on nothing but its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(count)


class EpochSampler(Sampler[int]):
    """Numbers below `count`, in an order drawn from (seed, epoch), or in their own; transformers calls `set_epoch`."""

    def __init__(self, count: int, seed: int, *, shuffle: bool = True):
        self.count, self.seed, self.shuffle = count, seed, shuffle
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by loader workers that live on

    @property
    def epoch(self) -> int:
        """What the next pass is drawn from."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw the next pass from `epoch`."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(shuffled(self.count, self.seed, self.epoch).tolist() if self.shuffle else range(self.count))


class LengthGroupedSampler(EpochSampler):
    """Rows of like length near each other, drawn from (seed, epoch); transformers' own draws from the global numbers.

    Args:
        lengths: of each row. size: rows that a step takes.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int):
        super().__init__(len(lengths), seed)
        self.lengths, self.size = list(lengths), size

    def __iter__(self) -> Iterator[int]:
        seed = int(np.random.default_rng([self.seed, self.epoch]).integers(1 << 62))
        generator = torch.Generator().manual_seed(seed)
        return iter(get_length_grouped_indices(self.lengths, self.size, generator=generator))


class RankBatches(Sampler[list[int]]):
    """This process's part of each global micro-batch of `ranks · batch_size` rows.

    The last global batch may be smaller; its rows are shared out evenly, and a process that gets none gets an empty
    list, which the collators make a batch of that trains nothing. So no row is repeated to fill a batch.

    Args:
        sampler: the rows of all processes; accelerate finds it here to set the epoch.
        drop_last: leave a smaller last batch out.
    """

    def __init__(
        self, sampler: Sampler[int], batch_size: int, *, rank: int = 0, ranks: int = 1, drop_last: bool = False
    ):
        self.sampler, self.batch_size, self.rank, self.ranks = sampler, batch_size, rank, ranks
        self.drop_last = drop_last

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.batch_size * self.ranks)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size * self.ranks
        rows = list(self.sampler)
        for begin in range(0, len(self) * size, size):
            part = rows[begin : begin + size]
            first, stop = (len(part) * rank // self.ranks for rank in (self.rank, self.rank + 1))
            yield part[first:stop]


class TokenBudgetBatches(Sampler[list[int]]):
    """Micro-batches of at most `tokens_per_batch` tokens, filled best-fit decreasing; their order changes each epoch.

    The groups are the same in every epoch, so an epoch always has the same number of steps. Each process takes every
    `ranks`-th group; where the last ones run out, some get an empty list.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        tokens_per_batch: int,
        seed: int,
        *,
        shuffle: bool = True,
        rank: int = 0,
        ranks: int = 1,
    ):
        self.groups = [rows.tolist() for rows in plan_packing(lengths, tokens_per_batch)]
        self.sampler = EpochSampler(len(self.groups), seed, shuffle=shuffle)
        self.rank, self.ranks = rank, ranks

    def __len__(self) -> int:
        return -(-len(self.groups) // self.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for begin in range(0, len(order), self.ranks):
            mine = order[begin + self.rank : begin + self.rank + 1]
            yield self.groups[mine[0]] if mine else []
