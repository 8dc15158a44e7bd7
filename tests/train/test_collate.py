"""Batches are read as text: what stands where, and what the loss looks at."""

import pytest
import torch

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
    for key, value in apart.items():
        assert torch.equal(together[key], value) if isinstance(value, torch.Tensor) else together[key] == value


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


@pytest.mark.parametrize("collator", [FlatCollator(), PaddedCollator(), FlatCollator(pad_to_multiple_of=8)])
def test_no_rows_make_a_batch_that_trains_nothing(collator):
    batch = collator([])
    assert batch["num_tokens"] == len(batch["loss_targets"]) == 0
    assert batch["input_ids"].numel() == 1
