"""Batches are read as text: what stands where, and what the loss looks at."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorForSeq2Seq

from tests.train.rows import token_rows
from tunesmith.train.collate import FlatCollator, PaddedCollator, loss_positions

ROWS = [
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    {"input_ids": [4, 5], "labels": [4, 5], "weights": [1.0, 0.5]},
]


def test_documents_lie_end_to_end():
    batch = FlatCollator()(ROWS)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["document_lengths"] == (3, 2)
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert "attention_mask" not in batch  # an all-ones mask would make transformers ignore the boundaries


def test_the_first_label_of_a_document_is_never_trained():
    batch = FlatCollator()(ROWS)
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5]]
    assert batch["loss_index"].tolist() == [0, 1, 3]
    assert batch["loss_targets"].tolist() == [2, 3, 5]
    assert batch["loss_weights"].tolist() == [1.0, 1.0, 0.5]


def test_a_packed_row_is_its_documents():
    packed = {
        "input_ids": [1, 2, 3, 4, 5],
        "labels": [-100, 2, 3, 4, 5],
        "weights": [1.0, 1.0, 1.0, 1.0, 0.5],
        "seq_lengths": [3, 2],
    }
    apart, together = FlatCollator()(ROWS), FlatCollator()([packed])
    del apart["rows"]
    for key, value in apart.items():
        assert torch.equal(together[key], value) if isinstance(value, torch.Tensor) else together[key] == value


def test_what_documents_begin_with_is_laid_down_once():
    rows = [
        {"input_ids": [7, 8, 9, 1, 2], "labels": [-100, -100, -100, 1, 2]},
        {"input_ids": [7, 8, 9, 3], "labels": [-100, -100, -100, 3], "weights": [1.0, 1.0, 1.0, 0.5]},
    ]
    batch = FlatCollator(share_prefix=True, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 1, 2, 9, 3, 0]]  # not the 9, which is followed by a trained token
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 0]]
    assert (batch["shared_prefix"], batch["document_lengths"]) == ((2, 2), (5, 2, 1))
    assert (batch["loss_index"].tolist(), batch["loss_targets"].tolist()) == ([2, 3, 5], [1, 2, 3])
    assert batch["loss_weights"].tolist() == [1.0, 1.0, 0.5]
    assert batch["num_tokens"] == 9


DOCUMENT = st.lists(st.integers(0, 1), min_size=1, max_size=6).flatmap(
    lambda ids: st.tuples(st.just(ids), st.integers(0, len(ids)))
)


@given(st.lists(DOCUMENT, min_size=1, max_size=4))
def test_shared_beginnings_can_be_put_back_and_train_nothing(drawn):
    rows = [{"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]} for ids, prompt in drawn]
    apart, shared = FlatCollator()(rows), FlatCollator(share_prefix=True)(rows)
    tokens, count = shared["shared_prefix"]
    ids, labels = (shared[name][0].split(shared["document_lengths"]) for name in ("input_ids", "labels"))
    whole = [torch.cat([ids[0][:tokens], part]) if 0 < index < count else part for index, part in enumerate(ids)]
    assert torch.cat(whole).tolist() == apart["input_ids"][0].tolist()
    assert shared["loss_targets"].tolist() == apart["loss_targets"].tolist()
    assert (labels[0][: tokens + 1] == -100).all()  # a loss at the prefix would count once in place of `count` times
    assert all(len(part) for part in ids)


@pytest.mark.parametrize("make", [list, torch.tensor, np.array])
def test_rows_may_be_lists_tensors_or_arrays(make):
    rows = [{name: make(values) for name, values in row.items()} for row in ROWS]
    for key, value in FlatCollator()(ROWS).items():
        found = FlatCollator()(rows)[key]
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found, value, rtol=0, atol=0)
        elif key != "rows":
            assert found == value


def test_padding_is_on_the_right_and_ignored_by_position():
    batch = PaddedCollator(pad_token_id=5)(ROWS)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100]]  # 5 is trained although it pads, too
    assert batch["loss_index"].tolist() == [0, 1, 3]
    assert batch["loss_weights"].tolist() == [1.0, 1.0, 0.5]


def test_padding_to_a_multiple():
    assert PaddedCollator(0, pad_to_multiple_of=8)(ROWS)["input_ids"].shape == (2, 8)


def test_both_layouts_train_the_same_tokens():
    rows = list(token_rows(weights=True))
    flat, padded = FlatCollator()(rows), PaddedCollator(0)(rows)
    assert flat["num_tokens"] == padded["num_tokens"] == sum(len(row["input_ids"]) for row in rows)
    for key in ("loss_targets", "loss_weights"):
        assert torch.equal(flat[key], padded[key])


def test_no_trained_token_is_no_position():
    assert loss_positions(torch.full((2, 3), -100))["loss_index"].numel() == 0


@pytest.mark.parametrize("multiple", [4, 8])
def test_flat_batches_are_padded_by_a_document_that_trains_nothing(multiple):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "weights": [1.0, 0.5, 0.5]}] * 3
    plain, padded = FlatCollator()(rows), FlatCollator(pad_to_multiple_of=multiple)(rows)
    assert padded["input_ids"].shape[1] == -(-9 // multiple) * multiple
    assert padded["num_tokens"] == plain["num_tokens"] == 9
    assert padded["loss_targets"].tolist() == plain["loss_targets"].tolist()
    assert sum(padded["document_lengths"]) == padded["input_ids"].shape[1]


# reliability: 48
@pytest.mark.parametrize("collator", [FlatCollator(), PaddedCollator(), FlatCollator(pad_to_multiple_of=8)])
def test_no_rows_make_a_batch_that_trains_nothing(collator):
    batch = collator([])
    assert batch["num_tokens"] == len(batch["loss_targets"]) == 0
    assert batch["input_ids"].numel() == 1


# workflow: C1
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("ignores", [True, False])
def test_padding_is_that_of_the_seq2seq_collator(byte_tokenizer, side, ignores):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.padding_side = side
    pad = tokenizer.pad_token_id
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in ROWS]
    expected = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100 if ignores else pad)(copy.deepcopy(rows))
    batch = PaddedCollator(pad, padding_side=side, ignore_pad_token_for_loss=ignores)(rows)
    expected["labels"][1, 1 if side == "left" else 0] = -100  # nothing predicts the first token of a row
    for key in ("input_ids", "attention_mask", "labels"):
        assert batch[key].tolist() == expected[key].tolist()


# workflow: C1
def test_on_the_left_positions_begin_with_the_row(make_tiny_model):
    left = PaddedCollator(5, padding_side="left", pad_to_multiple_of=4)(ROWS)
    right = PaddedCollator(5)(ROWS)
    assert left["position_ids"].tolist() == [[0, 0, 1, 2], [0, 0, 0, 1]]
    assert left["loss_targets"].tolist() == right["loss_targets"].tolist()
    assert left["loss_weights"].tolist() == right["loss_weights"].tolist()
    model = make_tiny_model()
    inputs = ("input_ids", "attention_mask", "position_ids")
    logits = [
        model(**{key: batch[key] for key in inputs if key in batch}).logits.flatten(0, 1)[batch["loss_index"]]
        for batch in (left, right)
    ]
    torch.testing.assert_close(*logits)


# workflow: C1
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_that_is_not_ignored_is_trained(side):
    batch = PaddedCollator(7, padding_side=side, ignore_pad_token_for_loss=False)([ROWS[0], ROWS[1], ROWS[1]])
    assert batch["loss_targets"].tolist().count(7) == (2 if side == "right" else 0)
    wide = PaddedCollator(7, 8, side, ignore_pad_token_for_loss=False)([ROWS[1]])
    assert wide["loss_targets"].tolist().count(7) == (6 if side == "right" else 5)
    assert wide["loss_weights"].tolist().count(1.0) == wide["loss_targets"].tolist().count(7)


def test_no_rows_train_nothing_even_where_padding_is_trained():
    assert PaddedCollator(7, 8, ignore_pad_token_for_loss=False)([])["loss_targets"].numel() == 0
