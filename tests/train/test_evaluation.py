"""Evaluation: per trained token, one forward a batch, every kind of evaluation set."""

import numpy as np
import pytest
import torch

from tests.train.rows import make_trainer, reference_gradients, token_rows
from tunesmith.errors import ConfigError
from tunesmith.train.options import SFTConfig
from tunesmith.train.sft import SFTTrainer

CHATS = [
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": answer}]}
    for answer in ("4", "four", "it is 4")
]


def counted_forwards(model) -> list:
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def evaluating(model, tokenizer, tmp_path, **options) -> SFTTrainer:
    metrics = options.pop("compute_metrics", None)
    trainer = make_trainer(model, tokenizer, None, tmp_path, eval_dataset=token_rows(), **options)
    trainer.compute_metrics = metrics
    return trainer


# trainer: A8
@pytest.mark.parametrize("size", [1, 3, 8])
def test_compute_metrics_sees_logits_and_labels_row_by_row_after_one_forward(
    make_tiny_model, byte_tokenizer, tmp_path, size
):
    def accuracy(prediction):
        logits, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        hits = (np.argmax(logits, -1) == labels) & (labels != -100)
        return {"accuracy": hits.sum() / (labels != -100).sum(), "rows": len(labels)}

    plain = evaluating(make_tiny_model(), byte_tokenizer, tmp_path).evaluate()
    model = make_tiny_model()
    trainer = evaluating(model, byte_tokenizer, tmp_path, compute_metrics=accuracy, per_device_eval_batch_size=size)
    calls = counted_forwards(model)
    found = trainer.evaluate()
    assert len(calls) == -(-8 // size)
    assert found["eval_rows"] == 8
    assert found["eval_accuracy"] == pytest.approx(plain["eval_mean_token_accuracy"])
    assert found["eval_loss"] == pytest.approx(plain["eval_loss"], abs=1e-5)


# trainer: A8
def test_without_compute_metrics_only_sums_leave_the_device(make_tiny_model, byte_tokenizer, tmp_path):
    model = make_tiny_model()
    expected, _ = reference_gradients(make_tiny_model(), token_rows())
    calls = counted_forwards(model)
    found = evaluating(model, byte_tokenizer, tmp_path).evaluate()
    assert found["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert found["eval_perplexity"] == pytest.approx(np.exp(expected), rel=1e-4)
    assert 0 < found["eval_entropy"] <= np.log(259)
    assert len(calls) == 1 + 6  # the batch, and the start-up check: two documents apart, then end to end, twice


# trainer: A9
def test_logits_are_preprocessed_before_metrics_see_them(make_tiny_model, byte_tokenizer, tmp_path):
    seen = {}
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, None, tmp_path, eval_dataset=token_rows())
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
    trainer.compute_metrics = lambda prediction: seen.update(shape=prediction.predictions.shape) or {}
    trainer.evaluate()
    assert seen["shape"] == (8, 17)


# trainer: A5
def test_a_dict_of_evaluation_sets_gives_metrics_for_each(make_tiny_model, byte_tokenizer, tmp_path):
    sets = {"short": token_rows((4, 5)), "chat": CHATS}
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, None, tmp_path, eval_dataset=sets)
    found = trainer.evaluate()
    assert {"eval_short_loss", "eval_chat_loss", "eval_chat_mean_token_accuracy"} <= found.keys()
    assert found["eval_short_loss"] == pytest.approx(
        reference_gradients(make_tiny_model(), token_rows((4, 5)))[0], abs=1e-5
    )
    assert trainer.reports["eval_dataset[chat]"].kept == 3


# trainer: A5
def test_evaluate_takes_rows_that_the_constructor_never_saw(make_tiny_model, byte_tokenizer, tmp_path):
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, eval_dataset=CHATS)
    at_start = trainer.evaluate()
    given = trainer.evaluate(CHATS, metric_key_prefix="given")
    assert given["given_loss"] == pytest.approx(at_start["eval_loss"], abs=1e-6)


# trainer: A12
def test_predict_returns_logits_and_labels(make_tiny_model, byte_tokenizer, tmp_path):
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, None, tmp_path)
    rows = token_rows((5, 9))
    output = trainer.predict(rows)
    assert output.predictions.shape == (2, 9, 259)
    assert output.label_ids[1].tolist()[3:] == rows[1]["labels"][3:]
    assert output.metrics["test_loss"] == pytest.approx(reference_gradients(make_tiny_model(), rows)[0], abs=1e-5)


def test_an_evaluation_set_without_a_trained_token_is_an_error(make_tiny_model, byte_tokenizer, tmp_path):
    rows = token_rows((5,)).map(lambda row: {"labels": [-100] * 5})
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, None, tmp_path)
    with pytest.raises(ConfigError, match="no trained token"):
        trainer.evaluate(rows)


def test_evaluation_in_training_keeps_the_training_mode(make_tiny_model, byte_tokenizer, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "eval_dataset": CHATS}
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, **options)
    trainer.train()
    evaluations = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert len(evaluations) == 2
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert torch.is_grad_enabled()


# rows and losses where logits are asked for --------------------------------------------------------------------------


def own_loss(outputs, labels, num_items_in_batch=None):
    """Mean cross entropy of a padded batch."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=-100)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
def test_metrics_of_logits_change_no_loss_whatever_the_batch_size(
    make_tiny_model, byte_tokenizer, tmp_path, own, streamed
):
    rows = token_rows((40, 4, 14, 6, 31, 5, 8, 17, 2, 9))
    found = []
    for metrics in (None, lambda prediction: {"rows": len(prediction.label_ids)}):
        for size in (1, 4, 10):
            trainer = SFTTrainer(
                make_tiny_model(),
                SFTConfig(
                    str(tmp_path), per_device_eval_batch_size=size, bf16=False, use_cpu=True, report_to="none",
                    disable_tqdm=True, save_strategy="no",
                ),
                train_dataset=rows,
                eval_dataset=rows.to_iterable_dataset() if streamed else rows,
                processing_class=byte_tokenizer,
                compute_metrics=metrics,
                compute_loss_func=own_loss if own else None,
            )  # fmt: skip
            found.append(trainer.evaluate())
    losses = [one["eval_loss"] for one in found]
    assert losses == pytest.approx([losses[0]] * 6, rel=1e-5)
    assert [one["eval_rows"] for one in found[3:]] == [10, 10, 10]


@pytest.mark.parametrize(
    "options",
    [{"dataloader_drop_last": True}, {"train_sampling_strategy": "group_by_length"}, {"packing": True}],
)
def test_predictions_are_of_every_row_in_its_order(make_tiny_model, byte_tokenizer, tmp_path, options):
    rows = token_rows((40, 4, 14, 6, 31, 5, 8, 17, 2, 9))
    options = {"per_device_eval_batch_size": 4, "max_length": 64, **options}
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, rows, tmp_path, **options)
    labels = trainer.predict(rows).label_ids
    assert [[token for token in row if token != -100] for row in labels.tolist()] == [
        [token for token in row if token != -100] for row in rows["labels"]
    ]
