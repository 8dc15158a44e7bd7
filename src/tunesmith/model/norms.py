"""Norm weights in float32 on a frozen base in half precision."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("norm", "ln_f", "ln_attn", "ln_mlp")
HALVES = (torch.bfloat16, torch.float16)


def hold_norms_in_float32(model: nn.Module) -> int:
    """Hold the frozen norms of a half-precision base in float32; returns how many tensors changed.

    Such a layer computes in float32 and answers in the base's type, so that the linear layers after it, whose weights
    are still halves, take its output with and without autocast, and queries stay halves for the flash kernels.
    """
    changed = 0
    for name, module in model.named_modules():
        weights = [
            parameter
            for own, parameter in module.named_parameters(recurse=False)
            if is_norm(f"{name}.{own}", parameter) and not parameter.requires_grad
        ]
        if not weights:
            continue
        before = weights[0].dtype
        for parameter in weights:
            parameter.data = parameter.data.float()
        module.register_forward_pre_hook(partial(cast_inputs, dtype=torch.float32))
        module.register_forward_hook(partial(cast_output, dtype=before))
        changed += len(weights)
    return changed


def is_norm(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a half-precision vector of a normalization layer, by its name."""
    return parameter.ndim == 1 and parameter.dtype in HALVES and any(part in name for part in NAMES)


def cast_inputs(module: nn.Module, inputs: tuple[Any, ...], *, dtype: torch.dtype) -> tuple[Any, ...]:
    """A forward pre-hook: floating inputs as `dtype`."""
    return tuple(
        value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
    )


def cast_output(module: nn.Module, inputs: tuple[Any, ...], output: Any, *, dtype: torch.dtype) -> Any:
    """A forward hook: the output as `dtype`."""
    return output.to(dtype) if isinstance(output, Tensor) else output
