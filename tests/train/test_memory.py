"""The memory of a step, told from sizes: against the bytes of real tensors of a tiny model."""

import pytest
import torch
from peft import LoraConfig

from benchmarks.memory import in_a_process
from tests.real import FOLDER, needs_model
from tests.train.rows import make_trainer, token_rows
from tunesmith.model import attention
from tunesmith.model.adapt import attach
from tunesmith.model.attention import attention_configs, documents_attend
from tunesmith.train.memory import Batch, Memory, activation_bytes, estimate, shape_of

LORA = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def kept_bytes(model, lengths, *, bf16: bool) -> int:
    """Bytes of what autograd keeps of one forward pass of the layers, each storage once, weights left out."""
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, or its place is used again
        return tensor

    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    inputs = {
        "input_ids": (torch.arange(sum(lengths)) % 64).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        "use_cache": False,
        "document_lengths": lengths,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
    }
    body = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        documents_attend(attention_configs(model)),
    ):
        body(**inputs)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("products", [False, True], ids=["kernel", "products"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_terms_of_a_layer_are_what_autograd_keeps(make_tiny_model, monkeypatch, bf16, adapter, products):
    """Between two depths, so that what is not of a layer falls out."""
    monkeypatch.setattr(attention, "has_half_products", lambda: products)
    lengths = (300, 130) if products else (24, 40)
    batch, kept, told = Batch(sum(lengths), 0, lengths), [], []
    for layers in (2, 4):
        model = make_tiny_model(num_hidden_layers=layers, hidden_size=96, intermediate_size=208, num_attention_heads=6)
        model = attach(model, LoraConfig(**LORA)) if adapter else model
        kept.append(kept_bytes(model, lengths, bf16=bf16))
        told.append(activation_bytes(model, shape_of(model), batch, 2 if bf16 else 4, False, "cpu")[0])
    assert told[1] - told[0] == pytest.approx(kept[1] - kept[0], rel=0.03)


def test_gradients_and_optimizer_are_counted_to_the_byte(tiny_model, byte_tokenizer, tmp_path):
    trainer = make_trainer(tiny_model, byte_tokenizer, token_rows(), tmp_path, max_steps=1)
    trainer.train()
    state = trainer.optimizer.state
    held = sum(value.nbytes for one in state.values() for name, value in one.items() if name != "step")
    assert trainer.memory.weights == sum(one.nbytes for one in (*tiny_model.parameters(), *tiny_model.buffers()))
    assert trainer.memory.gradients == sum(one.nbytes for one in tiny_model.parameters())
    assert trainer.memory.optimizer == held


def test_only_what_trains_has_gradients_and_states(tiny_model):
    wrapped = attach(tiny_model, LoraConfig(**LORA))
    count = sum(one.numel() for one in wrapped.parameters() if one.requires_grad)
    found = estimate(wrapped, Batch(64, 64), bf16=False)
    assert (found.gradients, found.optimizer) == (4 * count, 8 * count)
    assert estimate(wrapped, Batch(64, 64), bf16=False, optimizer="sgd").optimizer == 0


def test_a_shared_head_has_two_gradients_for_a_moment(make_tiny_model):
    apart, tied = make_tiny_model(), make_tiny_model(tie_word_embeddings=True)
    gradients = [estimate(model, Batch(8, 8), bf16=False).gradients for model in (apart, tied)]
    assert gradients[0] == gradients[1]


def test_a_model_without_values_is_told_as_one_with_them(make_tiny_model):
    with torch.device("meta"):
        empty = attach(make_tiny_model(), LoraConfig(**LORA))
    loaded = attach(make_tiny_model(), LoraConfig(**LORA))
    parts = [estimate(model, Batch(640, 64), bf16=True).to_json() for model in (empty, loaded)]
    for part in ("weights", "gradients", "optimizer", "activations", "logits"):
        assert parts[0][part] == parts[1][part]


def test_the_total_counts_the_larger_of_gradients_and_activations():
    parts = {"weights": 1.0, "gradients": 4.0, "optimizer": 8.0, "activations": 2.0, "logits": 1.0, "libraries": 16.0}
    assert Memory(**parts).total == 1 + 4 + 8 + 16
    assert Memory(**parts, accumulates=True).total == 1 + 4 + 8 + 3 + 16
    assert Memory(**parts, holes=0.5).total == 1 + 4 + 8 + 16 + 2


def test_checkpointing_keeps_the_values_of_one_layer(make_tiny_model):
    deep = make_tiny_model(num_hidden_layers=8)
    kept, again = (
        estimate(deep, Batch(1000, 0), bf16=False, checkpointing=checkpointing).activations
        for checkpointing in (False, True)
    )
    assert again < kept / 3


def test_a_module_of_ones_own_is_not_estimated():
    assert estimate(torch.nn.Linear(2, 2), Batch(8, 8), bf16=False) is None


@pytest.mark.real
@needs_model
def test_the_peak_of_a_real_model_is_within_a_fifth_of_the_estimate():
    found = in_a_process(FOLDER, "lora,float32,4x200")
    assert found["total"] == pytest.approx(found["measured"], rel=0.2)
