"""Cross-entropy over a vocabulary without all logits at once: rows in chunks, gradients formed in the forward pass.

    hidden (N, H) ── head, a chunk of rows at a time ──► logits (C, V) ──► Σ weight · nll   and   d/d hidden, d/d head

N counts trained positions only; the caller selects them. Three matrix products per position, the least there is.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOGITS_BYTES = 128 * 2**20
"""Largest block of float32 logits held at once."""


class TokenLoss(NamedTuple):
    """Sums over the trained positions of one batch."""

    loss: Tensor
    """Σ weight · nll in nats, scalar, differentiable."""
    correct: Tensor
    """How many targets were the likeliest token, scalar; 0 unless asked for."""
    entropy: Any = 0.0


def head_loss(
    head: nn.Module,
    project: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    count_correct: bool = False,
) -> TokenLoss:
    """Cross-entropy of `head` at rows of `hidden`.

    Args:
        head: the output projection; a plain linear layer takes the hand-written path.
        project: computes its logits, (N, H) → (N, V), for every other kind (LoRA on the head, 4-bit, ...).
        hidden: (N, H). targets: (N,) int64. weights: (N,) float32, or `None` for ones.
        count_correct: also count rows whose likeliest token is the target; one more pass over the logits.
    """
    head = active_module(head)
    if type(head) is nn.Linear:
        return TokenLoss(*LinearCrossEntropy.apply(hidden, head.weight, head.bias, targets, weights, count_correct))
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return TokenLoss(*AnyHeadCrossEntropy.apply(project, hidden, targets, weights, count_correct, *parameters))


def active_module(head: nn.Module) -> nn.Module:
    """The module that really projects: peft wraps a head that is trained whole (`modules_to_save`)."""
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        active = head.active_adapters[0] if getattr(head, "active_adapters", None) else None
        if active in copies and not getattr(head, "disable_adapters", False):
            return copies[active]
        return head.original_module
    return head


def rows_per_chunk(vocabulary: int) -> int:
    """Rows whose float32 logits fill `LOGITS_BYTES`, at least 16."""
    return max(16, LOGITS_BYTES // (4 * vocabulary))


class LinearCrossEntropy(torch.autograd.Function):
    """Head and loss in one, for `logits = hidden @ weight.T + bias`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor | None,
        count_correct: bool,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        with torch.autocast(device, enabled=False):
            rows, matrix = hidden.to(dtype), weight.to(dtype)
            loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
            correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
            grad_hidden = torch.empty_like(hidden) if want_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32) if want_bias else None
            size = rows_per_chunk(weight.shape[0])
            for begin in range(0, rows.shape[0], size):
                part = slice(begin, begin + size)
                chunk, target = rows[part], targets[part]
                scale = None if weights is None else weights[part].unsqueeze(1)
                logits = F.linear(chunk, matrix, None if bias is None else bias.to(dtype)).float()  # (C, V)
                if count_correct:
                    correct += (logits.argmax(-1) == target).sum()
                log_sum = logits.logsumexp(-1, keepdim=True)
                nll = log_sum - logits.gather(1, target.unsqueeze(1))
                loss += (nll if scale is None else nll * scale).sum()
                if not (want_hidden or want_weight or want_bias):
                    continue
                error = logits.sub_(log_sum).exp_()  # the softmax, in the logits' own memory
                error.scatter_add_(1, target.unsqueeze(1), torch.full_like(log_sum, -1.0))
                if want_bias:
                    grad_bias += (error if scale is None else error * scale).sum(0)
                error = error.to(dtype)
                if want_hidden:
                    product = error @ matrix
                    grad_hidden[part] = product if scale is None else product * scale
                if want_weight:
                    # weighting the short side (C, H) instead of the long one (C, V)
                    _add_product(grad_weight, error, chunk if scale is None else chunk * scale.to(dtype))
        ctx.grads = (grad_hidden, grad_weight, grad_bias)
        ctx.types = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_correct: Tensor | None) -> tuple:
        grads, ctx.grads = ctx.grads, None
        scaled = [None if grad is None else grad.mul_(grad_loss).to(dtype) for grad, dtype in zip(grads, ctx.types)]
        return (*scaled, None, None, None)


def _add_product(total: Tensor, error: Tensor, rows: Tensor) -> None:
    """Total (V, H) float32 += error.T (V, C) @ rows (C, H), in one pass where the types allow."""
    if error.dtype == torch.float32:
        total.addmm_(error.t(), rows)
    else:
        total.add_(error.t() @ rows)


class AnyHeadCrossEntropy(torch.autograd.Function):
    """Head and loss in one, for any head: autograd runs inside the forward pass, a chunk of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        project: Callable[[Tensor], Tensor],
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        count_correct: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted = [ctx.needs_input_grad[1], *ctx.needs_input_grad[5:]]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if wanted[0] else None
        grads = [torch.zeros_like(parameter) for parameter in parameters]
        begin, size = 0, 16  # the vocabulary shows with the first chunk
        while begin < hidden.shape[0]:
            part = slice(begin, begin + size)
            rows = hidden[part].detach().requires_grad_(any(wanted))
            with torch.set_grad_enabled(any(wanted)):
                logits = project(rows).float()
                nll = F.cross_entropy(logits, targets[part], reduction="none")
                chunk_loss = (nll if weights is None else nll * weights[part]).sum()
            if any(wanted):
                found = torch.autograd.grad(chunk_loss, [rows, *parameters], allow_unused=True)
                if wanted[0]:
                    grad_hidden[part] = found[0]
                _add_all(grads, found[1:])
            if count_correct:
                correct += (logits.argmax(-1) == targets[part]).sum()
            loss += chunk_loss.detach()
            begin, size = begin + size, rows_per_chunk(logits.shape[-1])
        ctx.grads = [grad_hidden, *grads]
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _grad_correct: Tensor | None) -> tuple:
        grads, ctx.grads = ctx.grads, None
        grad_hidden, *rest = (None if grad is None else grad.mul_(grad_loss.to(grad.dtype)) for grad in grads)
        return (None, grad_hidden, None, None, None, *rest)


def _add_all(totals: Sequence[Tensor], parts: Sequence[Tensor | None]) -> None:
    for total, part in zip(totals, parts):
        if part is not None:
            total += part


def logits_loss(
    logits: Tensor, targets: Tensor, weights: Tensor | None = None, *, count_correct: bool = False
) -> TokenLoss:
    """The same sums from logits (N, V) that already exist: for models that reshape their head's output."""
    logits = logits.float()
    nll = F.cross_entropy(logits, targets, reduction="none")
    correct = (logits.argmax(-1) == targets).sum() if count_correct else targets.new_zeros(())
    return TokenLoss((nll if weights is None else nll * weights).sum(), correct)
