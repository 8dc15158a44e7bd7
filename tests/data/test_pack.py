"""Plans equal a plain best-fit-decreasing; packed rows hold every token once, in order."""

import doctest

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

import tunesmith.data.pack
from tunesmith.data.pack import length_before_packing, pack, plan_packing
from tunesmith.errors import DataError

ROWS = [
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    {"input_ids": [4], "labels": [4]},
    {"input_ids": [5, 6], "labels": [5, -100]},
]


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """Tokens in each row, one document at a time."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, used in enumerate(rows) if used + length <= capacity]
        if fitting:
            rows[max(fitting, key=rows.__getitem__)] += length
        else:
            rows.append(length)
    return rows


@given(data=st.data(), capacity=st.integers(1, 40))
def test_the_plan_fills_rows_as_best_fit_decreasing_does(data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    plan = plan_packing(lengths, capacity)
    assert sorted(sum(lengths[i] for i in row) for row in plan) == sorted(plain_best_fit(lengths, capacity))
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))


def test_equal_lengths_keep_their_order_and_the_plan_repeats():
    lengths = np.random.default_rng(0).integers(1, 9, 1000)
    plan, again = plan_packing(lengths, 16), plan_packing(lengths, 16)
    assert np.array_equal(plan.order, again.order)
    assert np.array_equal(plan.offsets, again.offsets)
    assert [row.tolist() for row in plan_packing([2, 2, 2, 2], 4)] == [[0, 1], [2, 3]]
    assert (len(plan), plan[-1].tolist()) == (len(list(plan)), plan[len(plan) - 1].tolist())


@pytest.mark.parametrize(
    ("lengths", "what"), [([2, 5], "document 1 has 5 tokens, more than the 4"), ([0], "has 0 tokens")]
)
def test_documents_that_fit_no_row_are_an_error(lengths, what):
    with pytest.raises(DataError, match=what):
        plan_packing(lengths, 4)


def test_bfd_keeps_documents_whole():
    assert pack(ROWS, 4) == [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4], "seq_lengths": [3, 1]},
        {"input_ids": [5, 6], "labels": [5, -100], "seq_lengths": [2]},
    ]


def test_wrapped_fills_every_row_but_the_last_and_a_cut_document_goes_on_as_a_new_one():
    packed = pack(ROWS, 2, "wrapped")
    assert [row["input_ids"] for row in packed] == [[1, 2], [3, 4], [5, 6]]
    assert [row["seq_lengths"] for row in packed] == [[2], [1, 1], [2]]
    assert sum(len(row["seq_lengths"]) for row in packed) - len(ROWS) == 1
    assert [row["input_ids"] for row in pack(ROWS, 5, "wrapped")] == [[1, 2, 3, 4, 5], [6]]


def test_bfd_split_cuts_only_documents_that_no_row_can_hold():
    rows = [{"input_ids": [1, 2]}, {"input_ids": [10, 11, 12, 13, 14, 15, 16, 17, 18, 19]}, {"input_ids": [3]}]
    assert pack(rows, 4, "bfd_split") == [
        {"input_ids": [10, 11, 12, 13], "seq_lengths": [4]},
        {"input_ids": [14, 15, 16, 17], "seq_lengths": [4]},
        {"input_ids": [1, 2, 18, 19], "seq_lengths": [2, 2]},
        {"input_ids": [3], "seq_lengths": [1]},
    ]
    assert pack(rows[:1], 4, "bfd_split") == pack(rows[:1], 4)


@pytest.mark.parametrize(
    ("strategy", "too_long", "limit"),
    [
        ("bfd", "truncate", 8),
        ("wrapped", "truncate", None),
        ("bfd_split", "truncate_left", None),
        ("wrapped", "drop", 8),
    ],
)
def test_a_document_keeps_its_length_where_packing_cuts_it(strategy, too_long, limit):
    assert length_before_packing(8, strategy, too_long) == limit


def test_an_unknown_strategy_is_an_error_that_names_the_known_ones():
    with pytest.raises(DataError, match=r"unknown packing strategy 'ffd'\. Known: bfd, bfd_split, wrapped, blocks\."):
        pack(ROWS, 4, "ffd")


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    strategy=st.sampled_from(["bfd", "bfd_split", "wrapped"]),
)
def test_every_token_is_in_one_row_once(lengths, strategy):
    rows = [{"input_ids": [100 * i + k for k in range(length)]} for i, length in enumerate(lengths)]
    packed = pack(rows, 12 if strategy == "bfd" else 5, strategy)
    assert sorted(t for row in packed for t in row["input_ids"]) == [t for row in rows for t in row["input_ids"]]
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) <= 12 for row in packed)
    assert strategy == "bfd" or max(len(row["input_ids"]) for row in packed) <= 5
    for row in packed:  # tokens of one sequence are consecutive tokens of one document
        sequences = np.split(row["input_ids"], np.cumsum(row["seq_lengths"])[:-1])
        assert all(np.all(np.diff(sequence) == 1) for sequence in sequences)


def test_a_selected_dataset_is_packed_in_its_own_order_with_its_types():
    dataset = Dataset.from_list(ROWS).select([2, 1]).cast_column("input_ids", _int32_list())
    packed = pack(dataset, 8, "wrapped")
    assert packed.to_list() == [{"input_ids": [5, 6, 4], "labels": [5, -100, 4], "seq_lengths": [2, 1]}]
    assert packed.features["input_ids"].feature.dtype == "int32"


def test_documents_without_weights_get_ones():
    rows = [{"input_ids": [1], "weights": [0.5]}, {"input_ids": [2], "weights": None}]
    assert pack(rows, 2)[0]["weights"] == [0.5, 1.0]


def test_columns_of_other_lengths_are_an_error():
    with pytest.raises(DataError, match="document 1 has 2 input_ids, but 1 labels"):
        pack([{"input_ids": [1], "labels": [1]}, {"input_ids": [1, 2], "labels": [1]}], 4)
    with pytest.raises(DataError, match="document 0 has 2 input_ids, but 1 labels"):  # even if their sums are equal
        pack([{"input_ids": [1, 2], "labels": [1]}, {"input_ids": [1], "labels": [1, 2]}], 4)


def test_rows_are_gathered_in_chunks_without_a_seam(monkeypatch):
    whole = pack(ROWS * 5, 4)
    monkeypatch.setattr(tunesmith.data.pack, "TOKENS_PER_CHUNK", 3)
    assert pack(ROWS * 5, 4) == whole


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(tunesmith.data.pack).failed == 0


def _int32_list():
    from datasets import List, Value

    return List(Value("int32"))
