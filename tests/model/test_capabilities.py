"""The start-up checks see what a model does, not what it is called."""

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from tunesmith.model import capabilities
from tunesmith.model.capabilities import Support, agree, bf16_is_faster, bf16_speedup, probe_model


def test_a_plain_model_takes_flat_documents(tiny_model):
    tiny_model.train()
    assert probe_model(tiny_model) == Support("documents", plain_head=True, why="", shares_prefix=True)
    assert tiny_model.training


def test_a_leak_between_documents_is_seen(tiny_model, monkeypatch):
    leaking = tiny_model.model.layers[0].register_forward_hook(
        lambda module, args, output: output + output.mean(1, True)
    )
    support = probe_model(tiny_model)
    assert support.layout == "padded"
    assert "change with its neighbour" in support.why
    leaking.remove()


def test_a_table_of_positions_takes_no_longer_rows():
    """GPT-Neo's causal mask: two documents of half its positions fit, and a batch of more tokens does not."""
    how = {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "attention_types": [[["global", "local"], 1]]}
    model = GPTNeoForCausalLM(GPTNeoConfig(**how, num_heads=2, max_position_embeddings=32, window_size=8))
    support = probe_model(model)
    assert support.layout == "padded"
    assert "size of tensor a (32) must match the size of tensor b (34)" in support.why


def test_a_scaled_output_is_seen(tiny_model):
    scaled = tiny_model.register_forward_hook(
        lambda module, args, output: output.__setitem__("logits", output.logits * 2)
    )
    assert not probe_model(tiny_model).plain_head
    scaled.remove()


@pytest.mark.parametrize(("dtype", "noise", "same"), [(torch.float32, 1e-6, True), (torch.float32, 1e-2, False)])
def test_agreement_allows_rounding_only(dtype, noise, same):
    values = torch.linspace(-1, 1, 9, dtype=dtype)
    assert agree(values + noise, values) is same


def test_the_precision_probe_compares_times(monkeypatch):
    seconds = {torch.float32: 3.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(capabilities, "_product_seconds", lambda dtype: seconds[dtype])
    bf16_speedup.cache_clear()
    assert bf16_is_faster(torch.device("cpu"))
    seconds[torch.bfloat16] = 2.5  # faster, but not worth the rounding
    bf16_speedup.cache_clear()
    assert not bf16_is_faster(torch.device("cpu"))
    bf16_speedup.cache_clear()  # this machine's own answer for the tests after this
