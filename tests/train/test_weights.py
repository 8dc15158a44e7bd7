"""Weights of messages and tokens: they count in the loss, or the run is refused."""

import datasets
import pytest
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForSeq2Seq

from tests.tiny import make_byte_tokenizer
from tests.train.rows import assert_same, first_gradients, make_trainer, reference_gradients, token_rows
from tunesmith.errors import ConfigError
from tunesmith.train.collate import PaddedCollator
from tunesmith.train.options import SFTConfig
from tunesmith.train.sft import SFTTrainer

SKIPS = {"dataset_kwargs": {"skip_prepare_dataset": True}}


def chats(weight: float, times: int = 1) -> list[dict]:
    turns = [("user", "a?"), ("assistant", "bad"), ("user", "b?"), ("assistant", "good")]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[1]["weight"] = weight
    return [{"messages": messages}] * 2 * times


def own_loss(outputs, labels, num_items_in_batch=None):
    flat = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return cross_entropy(*flat, reduction="sum") / num_items_in_batch


def read_by(what: str) -> dict:
    collator = DataCollatorForSeq2Seq(make_byte_tokenizer()) if what == "data_collator" else None
    return {"data_collator": collator, "compute_loss_func": None if collator else own_loss}


def trainer_of(model, tmp_path, dataset, readers, **options):
    options = {"max_steps": 1} | options if isinstance(dataset, datasets.IterableDataset) else options
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, **options)
    return SFTTrainer(model, args, train_dataset=dataset, processing_class=make_byte_tokenizer(), **readers)


@pytest.mark.parametrize("what", ["data_collator", "compute_loss_func"])
@pytest.mark.parametrize("options", [{}, {"packing": True}])
def test_weights_that_would_not_count_are_refused_with_the_row(tiny_model, tmp_path, what, options):
    rows = chats(1.0) + chats(0.1)
    with pytest.raises(ConfigError, match=f"train_dataset row 3: the row has a weight, of which {what} knows nothing"):
        trainer_of(tiny_model, tmp_path, rows, read_by(what), **options)
    for weight in (0.0, 1.0):
        trainer_of(tiny_model, tmp_path, chats(weight), read_by(what), **options)


@pytest.mark.parametrize("what", ["data_collator", "compute_loss_func"])
def test_weights_of_tokens_and_of_streams_are_refused_too(tiny_model, tmp_path, what):
    with pytest.raises(ConfigError, match=f"train_dataset: the row has a weight, of which {what}"):
        trainer_of(tiny_model, tmp_path, token_rows(weights=True), read_by(what))
    for rows in (datasets.Dataset.from_list(chats(0.1)), token_rows(weights=True)):
        stream = rows.to_iterable_dataset()
        with pytest.raises(ConfigError, match=f"train_dataset row 1: the row has a weight, of which {what}"):
            trainer_of(tiny_model, tmp_path, stream, read_by(what)).train()


def test_workers_refuse_them_too(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("tunesmith.train.datasets.num_workers", lambda *_: 2)
    with pytest.raises(ConfigError, match="train_dataset row 1: the row has a weight"):
        trainer_of(tiny_model, tmp_path, chats(0.1, 20), read_by("compute_loss_func"))


def test_a_collator_of_ones_own_may_hand_weights_on(make_tiny_model, byte_tokenizer, tmp_path):
    rows = token_rows(weights=True)

    def collate(batch):
        made = PaddedCollator()(batch)
        kept = {name: made[name] for name in ("input_ids", "attention_mask", "labels")}
        return kept | {"weights": PaddedCollator()([row | {"labels": row["weights"]} for row in batch])["labels"]}

    options = {"data_collator": collate, "remove_unused_columns": False, "per_device_train_batch_size": len(rows)}
    with pytest.warns(UserWarning, match="keeps the columns weights of train_dataset"):
        trainer = make_trainer(make_tiny_model(), byte_tokenizer, rows, tmp_path, **options)
    assert_same(first_gradients(trainer), reference_gradients(make_tiny_model(), rows))


@pytest.mark.parametrize("as_stream", [False, True])
def test_a_column_weights_of_the_persons_is_none_of_tokens(make_tiny_model, byte_tokenizer, tmp_path, as_stream):
    plain = datasets.Dataset.from_list(chats(1.0))
    named = plain.add_column("weights", [[0.0] * 60] * 2)
    losses = []
    for rows in (plain, named):
        rows = rows.to_iterable_dataset() if as_stream else rows
        options = {"remove_unused_columns": False, "max_steps": 1}
        with pytest.warns(UserWarning, match="remove_unused_columns=False keeps"):
            trainer = make_trainer(make_tiny_model(), byte_tokenizer, rows, tmp_path, **options)
        losses.append(first_gradients(trainer)[0])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layout", [{}, {"padding_free": False}])
def test_padding_of_rows_that_nobody_prepared_is_not_attended(make_tiny_model, byte_tokenizer, tmp_path, side, layout):
    rows = list(token_rows())
    width = max(len(row["input_ids"]) for row in rows)

    def padded(values, fill):
        more = [fill] * (width - len(values))
        return more + values if side == "left" else values + more

    filled = [
        {
            "input_ids": padded(row["input_ids"], 258),
            "labels": padded(row["labels"], -100),
            "attention_mask": padded([1] * len(row["labels"]), 0),
        }
        for row in rows
    ]
    options = {"per_device_train_batch_size": len(rows), **SKIPS, **layout}
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, datasets.Dataset.from_list(filled), tmp_path, **options)
    assert_same(first_gradients(trainer), reference_gradients(make_tiny_model(), rows))


def test_limits_of_turns_beside_no_turns_are_refused():
    with pytest.raises(ConfigError, match="train_on='all' knows neither"):
        SFTConfig(train_on="all", max_target_length=9, use_cpu=True)
