"""Orders are drawn from (seed, epoch) alone, and budgets hold."""

import pytest

from tunesmith.errors import DataError
from tunesmith.train.batching import EpochSampler, TokenBudgetSampler


def orders(sampler):
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        yield list(sampler)


def test_every_epoch_has_every_row_in_an_order_of_its_own():
    first, second = orders(EpochSampler(50, seed=1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second != list(range(50))
    assert [first, second] == list(orders(EpochSampler(50, seed=1)))
    assert first != next(orders(EpochSampler(50, seed=2)))


def test_no_batch_is_over_the_budget_and_no_row_is_left_out():
    lengths = [7, 3, 9, 1, 5, 5, 2, 8]
    sampler = TokenBudgetSampler(lengths, 10, seed=0)
    for batches in orders(sampler):
        assert len(batches) == len(sampler) == 4
        assert sorted(row for batch in batches for row in batch) == list(range(8))
        assert max(sum(lengths[row] for row in batch) for batch in batches) <= 10


def test_a_row_over_the_budget_is_an_error():
    with pytest.raises(DataError, match="11"):
        TokenBudgetSampler([4, 11], 10, seed=0)
