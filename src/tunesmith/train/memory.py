"""How much memory a step of training takes, told before it: from sizes and options, no weight is looked at."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from tunesmith.model.adapt import decoder_layers, has_adapter
from tunesmith.model.attention import suit_products
from tunesmith.model.capabilities import output_head
from tunesmith.model.main_memory import resident_bytes
from tunesmith.model.product_attention import share_values
from tunesmith.model.shape import Shape, embeddings_of, layer_products, shape_of
from tunesmith.train.loss import TILE_BYTES, active_module, rows_per_block

FLOAT32 = 4
"""Bytes of a value."""

STATE_VALUES = {
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "ademamix_8bit", "paged_ademamix_8bit"), 0.5),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop", "rmsprop_bnb", "adagrad"), 1.0),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), 0.25),
    **dict.fromkeys(("sgd", "adafactor"), 0.0),  # adafactor keeps a row and a column of each matrix
}
"""Optimizer → float32 values that it keeps for each trained weight; 2, those of AdamW, where it is not named here."""

HOLES, HOLES_OF_ADAPTERS = 0.2, 0.45
"""Share of what comes and goes that malloc holds in vain beside it; the second for adapters in float32, whose outputs
are as large as the layers'. Measured: 8 to 27 %, and 21 to 80 % (docs/log.md). None under checkpointing, where
`allocator.save_memory` lets large blocks go, and on a GPU.
"""

IMPORTED = resident_bytes()
"""Bytes this process held when its libraries had been imported: mostly before any model."""


class Batch(NamedTuple):
    """The largest micro-batch that can come up."""

    tokens: int
    """Positions that the layers run over, padding too."""
    trained: int
    """Of them those whose next token is trained: the head runs at no other."""
    lengths: tuple[int, ...] = ()
    """Tokens of each of its documents, where rows tell."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the peak of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    """What layers keep for the backward pass; with checkpointing the inputs of all layers and the values of one."""
    logits: float
    """A block of logits, and what the head holds beside it."""
    libraries: float = 0.0
    """What the process holds without a model; nothing of it is on a GPU."""
    accumulates: bool = False
    """Gradients of the micro-batches before stay while the next one's activations are held."""
    holes: float = 0.0
    """Share of what comes and goes with a step that the allocator holds beside it."""

    @property
    def passing(self) -> float:
        """What comes and goes with a step; activations go as gradients come, so the larger counts, or both."""
        passing = self.activations + self.logits
        return self.gradients + passing if self.accumulates else max(self.gradients, passing)

    @property
    def allocator(self) -> float:
        """What the allocator holds in vain."""
        return self.holes * self.passing

    @property
    def total(self) -> float:
        """The peak."""
        return self.libraries + self.weights + self.optimizer + self.passing + self.allocator

    def to_json(self) -> dict[str, int]:
        """Each part and the total, in bytes."""
        names = ("weights", "gradients", "optimizer", "activations", "logits", "libraries", "allocator", "total")
        return {name: round(getattr(self, name)) for name in names}


def estimate(
    model: nn.Module,
    batch: Batch,
    *,
    bf16: bool,
    checkpointing: bool = False,
    optimizer: str = "adamw_torch_fused",
    accumulates: bool = False,
    device: str = "cpu",
) -> Memory | None:
    """The memory that training `model` takes on this machine; `None` where its config does not tell its sizes.

    Args:
        model: as it trains, with its adapter; it may lie on the meta device (`model.sketch`).
        batch: the largest micro-batch.
        bf16: products are formed in half precision; without it in the type of the weights.
        optimizer: as `optim` names it.
        accumulates: a step has several micro-batches.
        device: type of the device that trains.
    """
    shape = shape_of(model)
    if shape is None:
        return None
    product = 2 if bf16 else residual_bytes(model)
    weights = weight_bytes(model)
    loaded = 0.0 if is_meta(model) else weights
    kept, again = activation_bytes(model, shape, batch, product, checkpointing, device)
    logits = logit_bytes(model, shape, batch.trained, product, device)
    return Memory(
        weights=weights,
        gradients=gradient_bytes(model),
        optimizer=FLOAT32 * STATE_VALUES.get(optimizer, 2.0) * sum(one.numel() for one in trained(model)),
        activations=kept + max(0.0, again - logits),  # the logits are gone when a layer runs again
        logits=logits,
        libraries=max(IMPORTED, resident_bytes() - loaded) if device == "cpu" else 0.0,
        accumulates=accumulates,
        holes=0.0 if checkpointing or device != "cpu" else hole_share(model, product),
    )


# ---- what stays --------------------------------------------------------------------------------------------------


def trained(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that get gradients, once each."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def is_meta(model: nn.Module) -> bool:
    """Whether the model has sizes and no values."""
    return any(parameter.is_meta for parameter in model.parameters())


def weight_bytes(model: nn.Module) -> float:
    """Parameters and buffers as they are held, and the scales of quantized ones."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    for parameter in model.parameters():
        scales = getattr(getattr(parameter, "quant_state", None), "absmax", None)
        total += 0 if scales is None else scales.numel() * scales.element_size()
    return total


def gradient_bytes(model: nn.Module) -> float:
    """One for each trained weight; for a moment a head that shares the embeddings' weight has two."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in trained(model))
    head, embeddings = output_head(model), embeddings_of(model)
    shared = head is not None and embeddings is not None and active_module(head).weight is embeddings.weight
    return total + (embeddings.weight.numel() * FLOAT32 if shared and embeddings.weight.requires_grad else 0)


def hole_share(model: nn.Module, product: int) -> float:
    """Which of the measured shares of holes is this model's."""
    return HOLES_OF_ADAPTERS if has_adapter(model) and product == FLOAT32 else HOLES


# ---- what comes and goes -----------------------------------------------------------------------------------------


def layer_terms(shape: Shape, *, product: int, attention: int, casts: bool, norms: bool, inputs: float) -> dict:
    """Bytes of each thing that one layer keeps of one token for its backward pass.

    Source: what `torch.autograd.graph.saved_tensors_hooks` shows of a Llama in transformers 5.17 and 5.23 with our
    document attention (tests/train/test_memory.py compares); `adapter` stands apart, see `activation_bytes`.

    Args:
        product: bytes of a value that a product reads.
        attention: bytes of a value that attention reads.
        casts: norms give float32 and products read bfloat16, so every product keeps a copy of its input of its own.
        norms: the norms' weights train.
        inputs: share of the layer's products whose weight trains or has an adapter; others keep no input.
    """
    return {
        "inputs of both norms": 2 * shape.hidden * FLOAT32,
        "the same, normalized": 2 * shape.hidden * FLOAT32 * norms,
        "inputs of q, k, v, gate and up": (5 if casts else 2) * shape.hidden * product * inputs,
        "queries, keys, values, attended": 2 * (shape.queries + shape.keys) * attention,
        "attended, joined": shape.queries * product * inputs,
        "gate, its silu, up": 3 * shape.inner * product,
        "input of down": shape.inner * product * inputs,
        "scales of norms, sums of attention": (2 + shape.heads) * FLOAT32,
    }


def activation_bytes(
    model: nn.Module, shape: Shape, batch: Batch, product: int, checkpointing: bool, device: str
) -> tuple[float, float]:
    """What the layers hold at the end of the forward pass, and what one holds that checkpointing runs again later."""
    tokens, by_products = batch.tokens, forms_products(batch, product, device)
    products = layer_products(decoder_layers(model))
    read = [layer for layer in products if layer.weight.requires_grad or hasattr(layer, "lora_A")]
    norms = any(one.requires_grad and one.dim() == 1 for one in decoder_layers(model).parameters())
    terms = layer_terms(
        shape,
        product=product,
        # model/attention.py: otherwise short documents attend in float32
        attention=FLOAT32 if device == "cpu" and not by_products else product,
        casts=product < residual_bytes(model),
        norms=norms,
        inputs=len(read) / max(1, len(products)),
    )
    ranks = sum(one.shape[0] for name, one in model.named_parameters() if "lora_A" in name) * product
    layer = tokens * (sum(terms.values()) + ranks / shape.layers)
    layer += product * share_values(batch.lengths, shape.heads) if by_products else 0
    copies = copied_bytes(model, product)
    around = 3 * tokens * shape.hidden * FLOAT32  # the last norm and what it gives
    layers = layers_with_gradients(model)
    if not checkpointing:
        return layer * layers + copies + around, 0.0
    passed_back = tokens * (2 * shape.hidden + 4 * shape.inner) * product
    cached = copies if any(one.weight.requires_grad for one in products) else copies / shape.layers
    return tokens * shape.hidden * residual_bytes(model) * layers + cached + around, layer + passed_back


def forms_products(batch: Batch, product: int, device: str) -> bool:
    """Whether documents of this batch attend by products, and so keep their shares."""
    return bool(batch.lengths) and product == 2 and suit_products(torch.bfloat16, device, batch.lengths)


def layers_with_gradients(model: nn.Module) -> int:
    """Layers from the first on that has, or lies behind, something that trains; those before keep nothing."""
    embeddings, layers = embeddings_of(model), decoder_layers(model)
    if embeddings is not None and any(one.requires_grad for one in embeddings.parameters()):
        return len(layers)
    trains = [any(one.requires_grad for one in layer.parameters()) for layer in layers]
    return len(layers) - trains.index(True) if True in trains else 0


def copied_bytes(model: nn.Module, product: int) -> float:
    """Weights of the layers that autocast copies to half precision, and the backward pass reads; adapters' too."""
    matrices = (one for one in decoder_layers(model).parameters() if one.dim() == 2)
    return product * sum(one.numel() for one in matrices if one.is_floating_point() and one.element_size() > product)


def logit_bytes(model: nn.Module, shape: Shape, trained_tokens: int, product: int, device: str) -> float:
    """A block of logits, the softmax's pieces, the head's weight in the type of products, and hidden states."""
    head = output_head(model)
    weight = getattr(active_module(head), "weight", None) if head is not None else None
    if weight is None:
        return 0.0
    vocabulary = weight.shape[0]
    block = min(trained_tokens, rows_per_block(vocabulary, product)) * vocabulary * product
    tile = TILE_BYTES.get(device, 0) * torch.get_num_threads() * (product < FLOAT32)
    whole_product = weight.requires_grad and product < FLOAT32 and device != "cpu"  # CPUs form it in small pieces
    own = weight.numel() * product * ((product < weight.element_size()) + whole_product)
    return block + tile + own + 2 * trained_tokens * shape.hidden * FLOAT32


def residual_bytes(model: nn.Module) -> int:
    """Bytes of a value that one layer hands to the next: of the embeddings' type."""
    embeddings = embeddings_of(model)
    return FLOAT32 if embeddings is None else embeddings.weight.element_size()
