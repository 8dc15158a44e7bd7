"""Which rows make a batch, in which order: drawn from (seed, epoch) alone, so a resumed run sees the same."""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from tunesmith.data.pack import plan_packing


def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of `range(count)` that depends on nothing but its arguments."""
    return np.random.default_rng([seed, epoch]).permutation(count)


class EpochSampler(Sampler[int]):
    """Rows in an order drawn from (seed, epoch); transformers calls `set_epoch`."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed, self.epoch = count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the next pass from `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(shuffled(self.count, self.seed, self.epoch).tolist())


class TokenBudgetSampler(Sampler[list[int]]):
    """Micro-batches of at most `tokens_per_batch` tokens, filled best-fit decreasing; their order changes each epoch.

    The groups are the same in every epoch, so an epoch always has the same number of steps.
    """

    def __init__(self, lengths: Sequence[int], tokens_per_batch: int, seed: int, *, shuffle: bool = True):
        self.batches = [rows.tolist() for rows in plan_packing(lengths, tokens_per_batch)]
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the next pass from `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        order = shuffled(len(self.batches), self.seed, self.epoch) if self.shuffle else range(len(self.batches))
        return (self.batches[index] for index in order)
