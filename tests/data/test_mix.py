"""The plan of a mixture keeps every dataset's order and draws by weight; the datasets follow the plan."""

import doctest

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

import tunesmith.data.mix
from tunesmith.data.mix import mix_datasets, mix_streams, plan_mixture, shares_of
from tunesmith.errors import ConfigError, DataError

A = Dataset.from_dict({"text": [f"a{i}" for i in range(6)]})
B = Dataset.from_dict({"text": ["b0", "b1"]})


@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    seed=st.integers(0, 99),
    stop=st.sampled_from(["first", "all"]),
)
def test_rows_of_a_part_come_in_order_and_the_end_is_where_stop_says(sizes, seed, stop):
    plan = plan_mixture(sizes, [1.0 + i for i in range(len(sizes))], seed, stop)
    taken = [plan[plan[:, 0] == part, 1] for part in range(len(sizes))]
    assert all(np.array_equal(rows, np.arange(len(rows)) % size) for rows, size in zip(taken, sizes))
    whole = [len(rows) >= size for rows, size in zip(taken, sizes)]
    last = plan[-1, 0]
    assert plan[-1, 1] == sizes[last] - 1
    assert whole.count(True) == 1 if stop == "first" else all(whole)
    assert stop == "all" or whole[last]


def test_parts_are_drawn_by_their_weights_and_the_seed_repeats():
    plan = plan_mixture([100_000, 100_000, 100_000], [3, 1, 0], seed=1)
    counts = np.bincount(plan[:, 0], minlength=3)
    assert counts[0] == 100_000
    assert counts[1] / counts.sum() == pytest.approx(0.25, abs=0.01)
    assert counts[2] == 0
    assert np.array_equal(plan, plan_mixture([100_000, 100_000, 100_000], [6, 2, 0], seed=1))
    assert not np.array_equal(plan[:50], plan_mixture([100_000, 100_000, 100_000], [3, 1, 0], seed=2)[:50])


def test_without_weights_the_parts_come_whole_one_after_another():
    assert plan_mixture([2, 3]).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]
    assert list(mix_datasets([B, A])["text"]) == ["b0", "b1", *A["text"]]


def test_a_mixed_dataset_follows_the_plan():
    mixed = mix_datasets({"a": A, "b": B}, {"b": 1, "a": 3}, seed=5, stop="all")
    plan = plan_mixture([6, 2], [3, 1], 5, "all")
    assert list(mixed["text"]) == [f"{'ab'[part]}{row}" for part, row in plan]
    assert set(mixed["text"]) == {*A["text"], *B["text"]}
    assert mixed.column_names == ["text"]


def test_streams_are_interleaved_and_none_is_read_before():
    streams = [A.to_iterable_dataset(), B.to_iterable_dataset()]
    mixed = [row["text"] for row in mix_datasets(streams, [0.5, 0.5], stop="all")]
    assert set(mixed) == {*A["text"], *B["text"]}
    assert [row["text"] for row in mix_datasets(streams)] == [*A["text"], *B["text"]]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    stop=st.sampled_from(["first", "all"]),
)
def test_streams_are_laid_out_as_the_plan_says(sizes, seed, stop):
    shares = shares_of([1.0 + i for i in range(len(sizes))], range(len(sizes)))
    parts = [lambda cursor, part=part, size=size: ((part, row) for row in range(size))
             for part, size in enumerate(sizes)]  # fmt: skip
    plan = plan_mixture(sizes, shares, seed, stop)
    assert list(mix_streams(parts, shares, seed, stop=stop)) == [tuple(row) for row in plan.tolist()]
    assert list(mix_streams(parts, None)) == [tuple(row) for row in plan_mixture(sizes).tolist()]


def test_a_stream_that_is_read_once_cannot_repeat():
    once = iter([1])
    with pytest.raises(DataError, match="stream 1 of 2 gave rows once and none when it was read again"):
        list(mix_streams([lambda cursor: once, lambda cursor: iter(range(50))], np.array([0.9, 0.1]), 0, stop="all"))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "c": 1}, r"weights: there is no dataset 'c'\..* There are a, b\."),
        ({"a": 1}, r"weights: none is given for b\. Give 0"),
        ([1, 2, 3], r"weights: 3 for 2 datasets\."),
        ([1, -1], r"weights: -1 for dataset b; expected a number from 0 on\."),
        ([1, float("nan")], r"weights: nan for dataset b"),
        ([0, 0], r"weights: all are 0"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(weights, message):
    with pytest.raises(ConfigError, match=message):
        mix_datasets({"a": A, "b": B}, weights)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "got nothing"),
        ([A, B.to_iterable_dataset()], "got Dataset, IterableDataset"),
        ([A, B.rename_column("text", "body")], "dataset 0 has the columns text, but 1 has body.*train_dataset"),
        ([A, B.select([])], "dataset 1 has no rows"),
    ],
)
def test_parts_that_cannot_be_mixed_are_an_error(parts, message):
    with pytest.raises(ConfigError, match=message):
        mix_datasets(parts, [1] * len(parts))


def test_weights_may_be_numpys():
    assert len(mix_datasets([A, B], np.float32([0.5, 0.5]), stop="all")) >= len(A) + len(B)


@pytest.mark.parametrize("parts", [[A, B], [A.to_iterable_dataset(), B.to_iterable_dataset()]])
def test_another_word_for_where_to_stop_is_an_error(parts):
    with pytest.raises(ConfigError, match="is 'first' or 'all', not 'first_exhausted'"):
        mix_datasets(parts, [1, 1], stop="first_exhausted")


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(tunesmith.data.mix).failed == 0
