"""Models whose weights are of several types, such as a bfloat16 base with a head that trains in float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

HALVES = (torch.bfloat16, torch.float16)
CASTS_ITSELF = ("lora_", "trainable_tokens_")
"""Parts of names of adapters' weights, whose types peft joins itself."""


@contextmanager
def types_joined(model: nn.Module) -> Iterator[None]:
    """Inside, products of float32 weights with states in half precision are formed in the latter, as in training.

    There accelerate wraps the model's forward pass in autocast; `generate`, and a check before the trainer has the
    model, pass it by, and such a product raises. Nothing is changed where all weights are of one type, or where
    autocast is on.
    """
    device, half = device_and_half(model)
    if half is None or torch.is_autocast_enabled(device):
        yield
        return
    with torch.autocast(device, half):
        yield


def device_and_half(model: nn.Module) -> tuple[str, torch.dtype | None]:
    """The type of the model's device, and the half-precision type that it has beside float32; `None` if not both."""
    own = [one for name, one in model.named_parameters() if not any(part in name for part in CASTS_ITSELF)]
    types = {one.dtype for one in own}
    half = next((dtype for dtype in HALVES if dtype in types), None)
    return (own[0].device.type if own else "cpu"), (half if torch.float32 in types else None)
