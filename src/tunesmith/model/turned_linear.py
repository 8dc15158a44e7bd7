"""Linear layers whose weight gradient is formed from the turned short side, on CPUs that multiply bfloat16 in tiles.

    gradient (T, out), input (T, in)  ──  input.T (in, T) @ gradient ──► (in, out), turned over ──► float32

Of two transposed ways to the same product oneDNN is twice as fast where the long matrix stays as it is; turning the
short one and the result costs less than that, in kernels that `torch.compile` makes (docs/log.md, 2026-11-23).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.model.cpu import has_tiles

SQUARE = 1024
"""Layers of about as many outputs as inputs gain where they have at least this many."""


class TurnedLinear(torch.autograd.Function):
    """`x @ weight.T` for x (T, in) in bfloat16 and weight (out, in) in float32; the gradient of weight is float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """(T, out), as under autocast."""
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.type = weight.dtype
        return x @ cast.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and weight."""
        x, weight = ctx.saved_tensors
        widens = x.shape[1] <= grad.shape[1]
        by_weight = (x.t().contiguous() @ grad).t() if widens else grad.t().contiguous() @ x
        return grad @ weight, by_weight.to(ctx.type).contiguous()


def turned_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    """The forward pass of `layer`: by `TurnedLinear` where autocast casts to bfloat16, else as it is."""
    if not (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16):
        return F.linear(x, layer.weight, layer.bias)
    with torch.autocast("cpu", enabled=False):
        rows = x.to(torch.bfloat16).reshape(-1, x.shape[-1])
        result = TurnedLinear.apply(rows, layer.weight).view(*x.shape[:-1], -1)
        return result if layer.bias is None else result + layer.bias.to(result.dtype)


def gains(layer: nn.Module) -> bool:
    """Whether `layer` is a plain linear layer that trains and that this way is faster for, on this machine."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__ or not has_tiles():
        return False
    short, long = sorted(layer.weight.shape)
    return layer.weight.requires_grad and (long >= 2 * short or short >= SQUARE)
