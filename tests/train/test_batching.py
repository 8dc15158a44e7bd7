"""Orders are drawn from (seed, epoch) alone, budgets hold, and processes share rows out without repeating any."""

from itertools import chain

import pytest

from tunesmith.errors import DataError
from tunesmith.train.batching import EpochSampler, RankBatches, TokenBudgetBatches


def orders(batches, sampler=None):
    for epoch in (0, 1):
        (sampler or batches).set_epoch(epoch)
        yield list(batches)


def test_every_epoch_has_every_row_in_an_order_of_its_own():
    first, second = orders(EpochSampler(50, seed=1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second != list(range(50))
    assert [first, second] == list(orders(EpochSampler(50, seed=1)))
    assert first != next(orders(EpochSampler(50, seed=2)))


def test_no_batch_is_over_the_budget_and_no_row_is_left_out():
    lengths = [7, 3, 9, 1, 5, 5, 2, 8]
    budget = TokenBudgetBatches(lengths, 10, seed=0)
    for batches in orders(budget, budget.sampler):
        assert len(batches) == len(budget) == 4
        assert sorted(row for batch in batches for row in batch) == list(range(8))
        assert max(sum(lengths[row] for row in batch) for batch in batches) <= 10


def test_a_row_over_the_budget_is_an_error():
    with pytest.raises(DataError, match="11"):
        TokenBudgetBatches([4, 11], 10, seed=0)


# reliability: 48
@pytest.mark.parametrize("count", [1, 5, 8, 11, 16])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_processes_share_out_every_row_exactly_once(count, ranks):
    parts = [list(RankBatches(EpochSampler(count, seed=3), 2, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1  # every process takes as many steps
    together = [list(chain(*steps)) for steps in zip(*parts)]
    whole = list(RankBatches(EpochSampler(count, seed=3), 2 * ranks))
    assert together == whole  # and each global batch is that of one process
    assert sorted(chain(*whole)) == list(range(count))


def test_drop_last_leaves_out_the_smaller_last_batch():
    batches = RankBatches(EpochSampler(5, seed=0, shuffle=False), 2, drop_last=True)
    assert list(batches) == [[0, 1], [2, 3]]
    assert len(batches) == 2


def test_token_budgets_are_shared_out_whole():
    parts = [list(TokenBudgetBatches([4, 4, 4], 4, seed=0, rank=rank, ranks=2)) for rank in (0, 1)]
    assert [len(part) for part in parts] == [2, 2]
    assert sorted(chain(*parts[0], *parts[1])) == [0, 1, 2]
    assert parts[1][1] == []
