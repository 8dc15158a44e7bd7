"""The arithmetic of a training step, against the sum written out by hand."""

import pytest
from peft import LoraConfig

from tests import tiny
from tunesmith.evaluate.flops import count_flops, step_flops
from tunesmith.model.adapt import attach

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


# workflow: W8
def test_a_step_counts_every_matrix_product(tiny_model):
    vocabulary, hidden, inner, kv, layers, length = len(tiny.make_byte_tokenizer()), 32, 32, 16, 2, 64
    linear = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner) + hidden * vocabulary
    attention = layers * 2 * length * hidden  # scores and weighted values, per token
    figures = count_flops(tiny_model.config, batch_size=2, seq_length=length)
    products, angles = 2 * (linear + attention) * 2 * length, length * tiny_model.config.head_dim
    assert figures["forward"] in (products, products + angles)  # transformers 5.17 makes rope's angles by a product
    assert figures["backward"] == 2 * products
    assert figures["step"] == figures["forward"] + figures["backward"]
    assert figures["per_token"] == figures["step"] // (2 * length)
    assert figures["parameters"] == tiny_model.num_parameters()


def test_the_config_is_not_changed(tiny_model):
    count_flops(tiny_model.config, seq_length=8)
    assert tiny_model.config._attn_implementation == "sdpa"


def test_a_step_by_sizes_is_what_is_counted_by_operation(make_tiny_model):
    """Counted are full squares in attention, and gradients of the embeddings' output, as a full run needs them."""
    model, length = make_tiny_model(head_dim=8), 64
    counted = count_flops(model.config, batch_size=2, seq_length=length)
    found = step_flops(model)
    square = 2 * 2 * length * length * found.per_square  # twice the causal half
    assert found.of(2 * length, 2 * length, 0) + square == pytest.approx(counted["step"], rel=1e-3)


def test_frozen_weights_take_four_operations_and_trained_ones_six(make_tiny_model):
    full, wrapped = step_flops(make_tiny_model()), attach(make_tiny_model(), LORA)
    adapter = sum(one.numel() for one in wrapped.parameters() if one.requires_grad)
    lora = step_flops(wrapped)
    assert lora.per_token == full.per_token * 4 / 6 + 6 * adapter
    assert lora.per_trained_token == full.per_trained_token * 4 / 6
    assert lora.per_square == full.per_square


def test_below_the_first_trained_layer_only_the_forward_pass_counts(make_tiny_model):
    model = make_tiny_model()
    whole = step_flops(model).per_token
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    assert step_flops(model).per_token == pytest.approx(whole * (2 / 6 + 1) / 2)
