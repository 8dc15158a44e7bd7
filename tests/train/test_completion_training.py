"""A completion-only collator given to the trainer: labels once per document, flat batches, packing."""

import warnings

import datasets
import pytest
from transformers import DataCollatorForLanguageModeling

from tests.train.rows import assert_same, first_gradients, make_trainer, reference_gradients
from tunesmith.train.completion_only import DataCollatorForCompletionOnlyLM, TemplateNotFound

TEXTS = [{"text": f"### Q: {'x' * n}\n### A: {'y' * (12 - n)}"} for n in (1, 4, 7, 10, 3, 6)]
NO_ANSWER = {"text": "### Q: and nothing more"}


def collator(tokenizer, **options):
    return DataCollatorForCompletionOnlyLM("### A:", tokenizer=tokenizer, **options)


def trainer_with(model, tokenizer, rows, tmp_path, missing="warn", **options):
    dataset = datasets.Dataset.from_list(rows)
    given = collator(tokenizer, on_missing_template=missing)
    return make_trainer(model, tokenizer, dataset, tmp_path, data_collator=given, **options)


# trainer: D7 G1 D2
@pytest.mark.parametrize("layout", [{}, {"packing": True, "max_length": 96}, {"padding_free": False}])
def test_packed_or_not_the_gradients_are_those_of_the_answers_alone(make_tiny_model, byte_tokenizer, tmp_path, layout):
    given = collator(byte_tokenizer)
    rows = []
    for text in TEXTS:
        ids = byte_tokenizer(text["text"] + "<|im_end|>")["input_ids"]
        rows.append({"input_ids": ids, "labels": given.labels_for(ids)})
    trainer = trainer_with(make_tiny_model(), byte_tokenizer, TEXTS, tmp_path, **layout)
    assert (len(trainer.train_dataset) < len(TEXTS)) == bool(layout.get("packing"))
    assert_same(first_gradients(trainer), reference_gradients(make_tiny_model(), datasets.Dataset.from_list(rows)))


# trainer: D6
def test_a_row_without_the_template_warns_once_and_is_counted(make_tiny_model, byte_tokenizer, tmp_path):
    with pytest.warns(UserWarning, match="Could not find response key") as said:
        trainer = trainer_with(make_tiny_model(), byte_tokenizer, [*TEXTS, NO_ANSWER, NO_ANSWER], tmp_path)
    report = trainer.reports["train_dataset"]
    assert len([one for one in said if "response key" in str(one.message)]) == 1
    assert (report.kept, report.num_dropped) == (6, 2)
    assert "template does not occur" in report.drops[0].detail


# trainer: D6
def test_a_row_without_the_template_is_skipped_in_silence_or_an_error(make_tiny_model, byte_tokenizer, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = trainer_with(make_tiny_model(), byte_tokenizer, [*TEXTS, NO_ANSWER], tmp_path, missing="skip")
    assert trainer.reports["train_dataset"].num_dropped == 1
    with pytest.raises(RuntimeError, match="train_dataset row 7: Could not find response key") as error:
        trainer_with(make_tiny_model(), byte_tokenizer, [*TEXTS, NO_ANSWER], tmp_path, missing="error")
    assert isinstance(error.value, TemplateNotFound)


# trainer: D1 D9
def test_a_subclass_or_another_layout_makes_its_own_batches(make_tiny_model, byte_tokenizer, tmp_path):
    class Mine(DataCollatorForCompletionOnlyLM):
        calls = 0

        def torch_call(self, examples):
            Mine.calls += 1
            return super().torch_call(examples)

    for given in (Mine("### A:", tokenizer=byte_tokenizer), collator(byte_tokenizer, padding_free=True)):
        dataset = datasets.Dataset.from_list(TEXTS)
        options = {"data_collator": given, "max_steps": 1}
        trainer = make_trainer(make_tiny_model(), byte_tokenizer, dataset, tmp_path, **options)
        assert trainer.data_collator is given
        trainer.train()
    assert Mine.calls == 1


# trainer: D7 M2
def test_tokenized_rows_are_labelled_by_the_collator(make_tiny_model, byte_tokenizer, tmp_path):
    ids = [byte_tokenizer(text["text"])["input_ids"] for text in TEXTS]
    trainer = trainer_with(make_tiny_model(), byte_tokenizer, [{"input_ids": one} for one in ids], tmp_path)
    assert trainer.train_dataset["labels"] == [collator(byte_tokenizer).labels_for(one) for one in ids]


# trainer: D1 A4
def test_a_collator_whose_place_ours_take_still_says_what_to_pad_to(make_tiny_model, byte_tokenizer, tmp_path):
    completion = collator(byte_tokenizer, pad_to_multiple_of=64)
    for given in (completion, DataCollatorForLanguageModeling(byte_tokenizer, mlm=False, pad_to_multiple_of=64)):
        rows = datasets.Dataset.from_list(TEXTS)
        trainer = make_trainer(make_tiny_model(), byte_tokenizer, rows, tmp_path, data_collator=given)
        assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[1] % 64 == 0
