"""The real model: our first step is a plain loop's, and thirty steps lower held-out loss."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.real import FOLDER, needs_model, shared_data
from tunesmith.config import DataConfig
from tunesmith.data.collect import collect
from tunesmith.data.prepare import encode_examples
from tunesmith.data.report import Report
from tunesmith.model.load import load_model, load_tokenizer
from tunesmith.train.options import SFTConfig
from tunesmith.train.sft import SFTTrainer

pytestmark = [pytest.mark.real, needs_model]
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def rows(tokenizer):
    report = Report()
    examples = collect(DataConfig(dataset=str(shared_data("alpaca_en_demo.json")))).train
    return encode_examples(examples, tokenizer, report, max_length=1024)


def build(adapter):
    model = load_model(FOLDER, dtype="float32")
    torch.manual_seed(0)
    return get_peft_model(model, LORA) if adapter else model


def trainer_for(model, tokenizer, rows, folder, lora=None, **options):
    defaults = {"bf16": False, "use_cpu": True, "save_strategy": "no", "train_sampling_strategy": "sequential"}
    args = SFTConfig(output_dir=str(folder), **{**defaults, **options})
    return SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)


def plain_loss_and_norm(model, rows):
    """transformers' own padded forward pass and logits, `F.cross_entropy`, autograd."""
    width = max(len(ids) for ids in rows["input_ids"])
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[index, :length] = torch.tensor(row["input_ids"])
        mask[index, :length] = 1
        labels[index, 1:length] = torch.tensor(row["labels"])[1:]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return loss.item(), torch.stack([grad.norm() for grad in grads]).norm().item()


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_the_first_step_is_that_of_a_plain_loop(tokenizer, rows, tmp_path, adapter):
    few = rows.select(range(3))
    expected = plain_loss_and_norm(build(adapter), few)
    trainer = trainer_for(build(adapter), tokenizer, few, tmp_path, max_steps=1, per_device_train_batch_size=3)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert (entry["loss"], entry["grad_norm"]) == pytest.approx(expected, rel=1e-4)


def test_thirty_steps_lower_held_out_loss(tokenizer, rows, tmp_path):
    short = rows.filter(lambda row: len(row["input_ids"]) <= 128)
    train, held_out = short.select(range(60)), short.select(range(60, 76))
    options = {"max_steps": 30, "per_device_train_batch_size": 2, "learning_rate": 5e-4}
    trainer = trainer_for(build(True), tokenizer, train, tmp_path, **options)
    before = trainer.evaluate(held_out)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(held_out)["eval_loss"] < before - 0.05


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_an_adapter_trains_on_a_base_of_few_bits(tokenizer, rows, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    few = rows.filter(lambda row: len(row["input_ids"]) <= 64).select(range(4))
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    trainer = trainer_for(FOLDER, tokenizer, few, tmp_path, model_init_kwargs={bits: True}, lora=LORA, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.support.layout == "documents"
    assert losses[-1] < losses[0] - 0.1


def test_every_demo_row_trains_exactly_its_answer(tokenizer, rows):
    examples = json.loads(shared_data("alpaca_en_demo.json").read_text(encoding="utf-8"))
    assert len(rows) == len(examples)
    answers = {example["output"] + "<|im_end|>" for example in examples}
    for row in rows:
        assert tokenizer.decode([label for label in row["labels"] if label != -100]) in answers
