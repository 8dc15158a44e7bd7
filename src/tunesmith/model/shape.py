"""What a model is made of, for those who count: the sizes of its layers, and the modules that multiply."""

from typing import NamedTuple

from torch import nn


class Shape(NamedTuple):
    """Sizes of one layer, in values per token."""

    layers: int
    hidden: int
    heads: int
    queries: int
    keys: int
    inner: int


def shape_of(model: nn.Module) -> Shape | None:
    """The sizes that the model's config tells; `None` if it lacks one. Of experts those that a token is sent to."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, hidden, heads = (
        getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    if not (layers and hidden and heads and any(isinstance(part, nn.ModuleList) for part in model.modules())):
        return None
    width = getattr(config, "head_dim", None) or hidden // heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    if experts := getattr(config, "num_experts_per_tok", None):
        inner = experts * (getattr(config, "moe_intermediate_size", None) or inner)
    keys = (getattr(config, "num_key_value_heads", None) or heads) * width
    return Shape(layers, hidden, heads, heads * width, keys, inner)


def layer_products(layers: nn.Module) -> list[nn.Module]:
    """Modules inside `layers` that multiply with a matrix; adapters count with the module they stand beside."""
    found = []
    for name, module in layers.named_modules():
        if "lora_" not in name and not name.endswith("base_layer") and getattr(module, "weight", None) is not None:
            found += [module] if module.weight.dim() == 2 else []
    return found


def embeddings_of(model: nn.Module) -> nn.Module | None:
    """The input embeddings, if the model has any."""
    return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
