"""The arithmetic of a training step, against the sum written out by hand."""

from tests import tiny
from tunesmith.evaluate.flops import count_flops


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
