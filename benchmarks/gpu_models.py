"""Models of true shapes with random weights, made on the device without a file; rows; what a step must cost."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn


class Shape(NamedTuple):
    """The sizes of a decoder; `family` is transformers' name of its architecture."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool

    @property
    def layer_products(self) -> int:
        """Weights of all layers that a token is multiplied with."""
        head_dim = self.hidden_size // self.num_attention_heads
        attention = 2 * self.hidden_size * (self.hidden_size + self.num_key_value_heads * head_dim)
        return self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)


SHAPES = {
    "0.5b": Shape("qwen2", 151_936, 896, 4_864, 24, 14, 2, True),  # Qwen2.5-0.5B
    "1b": Shape("llama", 128_256, 2_048, 8_192, 16, 32, 8, True),  # Llama-3.2-1B
    "8b": Shape("llama", 128_256, 4_096, 14_336, 32, 32, 8, False),  # Llama-3.1-8B
    "tiny": Shape("llama", 300, 64, 128, 2, 4, 2, False),
}

MEAN_LOG, SPREAD_LOG, SHORTEST, LONGEST = 5.1, 0.6, 20, 750
"""Lengths of alpaca_en_demo under SmolLM2's tokenizer: mean 201, p95 452, longest 750."""


def make_model(name: str, device: str, dtype: torch.dtype, *, four_bits: bool = False, seed: int = 0) -> nn.Module:
    """A model of `SHAPES[name]` on `device`; on one device a seed always gives the same weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = SHAPES[name]._asdict()
    config = AutoConfig.for_model(sizes.pop("family"), **sizes, max_position_embeddings=4_096)
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return in_four_bits(model) if four_bits else model


def in_four_bits(model: nn.Module) -> nn.Module:
    """Put NF4 layers in place of the linear ones, but for the head, as `load_in_4bit` does."""
    import bitsandbytes
    from transformers.utils.quantization_config import QuantizationMethod

    head = model.get_output_embeddings()
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer is not head:
                packed = bitsandbytes.nn.Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    bias=layer.bias is not None,
                    compute_dtype=layer.weight.dtype,
                    quant_type="nf4",
                    device="meta",
                )
                weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                packed.weight = weight.to(layer.weight.device)  # here it is quantized
                packed.weight.module = packed
                packed.bias = layer.bias
                setattr(parent, name, packed)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = model.is_quantized = True
    model.quantization_method = QuantizationMethod.BITS_AND_BYTES
    model.hf_quantizer = SimpleNamespace(is_trainable=True, is_qat_trainable=False)  # trainers ask it
    return model


def make_rows(name: str, count: int, seed: int = 0) -> Any:
    """A `datasets.Dataset` of `count` rows of random tokens with Alpaca-like lengths, of which a quarter is prompt."""
    import datasets

    generator = np.random.default_rng(seed)
    lengths = generator.lognormal(MEAN_LOG, SPREAD_LOG, count).clip(SHORTEST, LONGEST).astype(int)
    if name == "tiny":
        lengths = lengths // 10
    ids = [generator.integers(3, SHAPES[name].vocab_size, length).tolist() for length in lengths]
    labels = [[-100] * (len(row) // 4) + row[len(row) // 4 :] for row in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})


def needed_flops(name: str, rows: list[list[int]], labels: list[list[int]], adapters: int | None = None) -> int:
    """Floating-point operations that training on `rows` takes at the least; a multiply and an add are two.

    The head counts at trained tokens only, attention below the diagonal only, nothing is computed twice. `adapters`
    are the parameters of LoRA, whose base needs no gradients of its weights; `None` trains all weights.
    """
    shape = SHAPES[name]
    tokens = sum(map(len, rows))
    trained = sum(label != -100 for row in labels for label in row[1:])
    seen = sum(len(row) * (len(row) + 1) // 2 for row in rows)
    products = 2 * (tokens * shape.layer_products + trained * shape.vocab_size * shape.hidden_size)
    attention = 4 * seen * shape.hidden_size * shape.num_hidden_layers
    if adapters is None:
        return 3 * (products + attention)
    return 2 * products + 3 * attention + 6 * tokens * adapters
