"""How much arithmetic a step of training takes: by sizes while it runs, or operation by operation without weights."""

import copy
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tunesmith.model.adapt import decoder_layers
from tunesmith.model.capabilities import output_head
from tunesmith.model.shape import embeddings_of, layer_products, shape_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def count_flops(config: "PretrainedConfig", batch_size: int = 1, seq_length: int = 512) -> dict[str, int]:
    """Floating-point operations of a batch of full rows; a multiplication and an addition are two.

    Counted are matrix products, attention's too, as every published figure does. Nothing is computed and no weight is
    allocated, so a model of any size takes seconds.

    Args:
        config: the model's, e.g. from `AutoConfig.from_pretrained`; it is not changed.
        batch_size: rows.
        seq_length: tokens per row.

    Returns: `forward`, `backward` of training all weights, `step` their sum, `parameters`, and `per_token` of a step.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
        ids = torch.zeros(batch_size, seq_length, dtype=torch.long)
        mask = torch.zeros(batch_size, 1, seq_length, seq_length)  # a whole one is not looked into: it has no values
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    step = counter.get_total_flops()
    return {
        "forward": forward,
        "backward": step - forward,
        "step": step,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "per_token": step // (batch_size * seq_length),
    }


class StepFlops(NamedTuple):
    """Floating-point operations that training needs, whatever else a program does; a product and a sum are two."""

    per_token: float
    """In the layers' matrix products, forward and backward."""
    per_trained_token: float
    """In the head's, which runs where a token is trained."""
    per_square: float
    """In attention, for each document as often as its length squared: causal, so half of a full square."""

    def of(self, tokens: int, trained: int, squares: int) -> float:
        """Of a batch: its real tokens, the trained ones, and the sum of its documents' squared lengths."""
        return self.per_token * tokens + self.per_trained_token * trained + self.per_square * squares


def step_flops(model: nn.Module) -> StepFlops:
    """What one step of training `model` needs, by the usual arithmetic (Kaplan et al. 2020, arXiv:2001.08361).

    Each weight of a matrix takes 2 operations a token forward, 2 for the gradient of its input, and 2 for its own
    gradient if it trains; so 6 where all train and 4 for frozen weights below which something trains. What is computed
    again under checkpointing does not count. Embeddings multiply nothing. Of experts count those a token is sent to.
    """
    embeddings, head = embeddings_of(model), output_head(model)
    if not any(isinstance(part, nn.ModuleList) for part in model.modules()):
        return StepFlops(0.0, 0.0, 0.0)  # a module of a person's own: nobody knows its layers
    reached = embeddings is not None and any(one.requires_grad for one in embeddings.parameters())
    per_token = 0.0
    for layer in decoder_layers(model):
        reached = reached or any(one.requires_grad for one in layer.parameters())
        per_token += sum(count * (2 + 2 * reached + 2 * trains) for count, trains in matrices(layer))
    shape, weight = shape_of(model), getattr(head, "weight", None)
    per_trained = 0.0 if weight is None else weight.numel() * (4 + 2 * weight.requires_grad)
    return StepFlops(per_token, per_trained, 0.0 if shape is None else 6.0 * shape.layers * shape.queries)


def matrices(layer: nn.Module) -> list[tuple[float, bool]]:
    """(weights, trained) of every matrix in a layer that a token is multiplied with, adapters' too."""
    config = getattr(next((part for part in layer.modules() if hasattr(part, "config")), None), "config", None)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    share = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    found = []
    products = {id(product.weight): product for product in layer_products(layer)}
    for name, parameter in layer.named_parameters():
        if parameter.dim() < 2 or "lora_embedding" in name:
            continue
        product = products.get(id(parameter))
        sizes = (getattr(product, "in_features", None), getattr(product, "out_features", None))
        count = sizes[0] * sizes[1] if None not in sizes else parameter.numel()  # packed weights have fewer numbers
        found.append((count * (share if "experts" in name else 1.0), parameter.requires_grad))
    return found
