"""The largest micro-batch is told beforehand: it is the largest of those that the run then trains on."""

import pytest

from tests.train.rows import make_trainer, token_rows
from tunesmith.train import largest
from tunesmith.train.largest import largest_batch
from tunesmith.train.options import SFTConfig

LENGTHS = (9, 4, 14, 6, 11, 5, 8, 17, 3, 12, 7)
SHUFFLED = {"train_sampling_strategy": "random", "num_train_epochs": 3}


def trained_on(trainer) -> list[dict]:
    """Every micro-batch of a run, as the model gets it."""
    seen, one_pass = [], trainer._one_pass
    trainer._one_pass = lambda model, inputs, items: seen.append(inputs) or one_pass(model, inputs, items)
    trainer.train()
    return seen


@pytest.mark.parametrize(
    "options",
    [
        SHUFFLED,
        {**SHUFFLED, "seed": 7},
        {**SHUFFLED, "train_sampling_strategy": "group_by_length"},
        {**SHUFFLED, "train_sampling_strategy": "sequential"},
        {**SHUFFLED, "gradient_accumulation_steps": 2, "max_steps": 5},
        {**SHUFFLED, "dataloader_drop_last": True},
        {**SHUFFLED, "packing": True, "max_length": 24},
        {**SHUFFLED, "padding_free": False},
    ],
)
def test_it_is_the_largest_that_comes_up(make_tiny_model, byte_tokenizer, tmp_path, options):
    rows = token_rows(LENGTHS)
    options = {"per_device_train_batch_size": 3, **options}
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, rows, tmp_path, **options)
    told, batches = trainer.largest_batch, trained_on(trainer)
    assert told.tokens == max(batch["input_ids"].numel() for batch in batches)
    largest = [batch for batch in batches if batch["input_ids"].numel() == told.tokens]
    if trainer.support.layout == "documents":
        assert told.lengths in [batch["document_lengths"] for batch in largest]
    if options["train_sampling_strategy"] == "random" and not {"packing", "padding_free"} & options.keys():
        assert told.tokens < sum(sorted(LENGTHS)[-3:])  # which the longest rows would be, all at once


def test_of_batches_that_others_draw_it_may_be_the_longest_rows(tmp_path):
    rows = token_rows(LENGTHS)
    args = SFTConfig(output_dir=str(tmp_path), per_device_train_batch_size=3, use_cpu=True)
    assert largest_batch(rows, args, drawn=False).lengths == (17, 14, 12)
    args.train_sampling_strategy = "batch_rebalance"
    assert largest_batch(rows, args).tokens == 43


def test_of_a_long_run_the_first_epochs_stand_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(largest, "DRAWS", 25)
    seen, sampler = [], largest.epoch_sampler
    monkeypatch.setattr(largest, "epoch_sampler", lambda *how: seen.append(sampler(*how)) or seen[-1])
    args = SFTConfig(output_dir=str(tmp_path), num_train_epochs=1000, use_cpu=True)
    assert largest_batch(token_rows(LENGTHS), args).tokens > 0
    assert seen[0].epoch == 1  # two epochs of eleven rows
