"""The loss over a vocabulary without all logits at once: rows in blocks, gradients formed in the forward pass.

    hidden (N, H) ── head, a block of rows at a time ──► logits (C, V) ──► Σ weight · loss   and   d/d hidden, d/d head

N counts trained positions only; the caller selects them. Three matrix products per position, the least there is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tunesmith.errors import ConfigError
from tunesmith.lookup import lookup
from tunesmith.model.cpu import has_tiles

LOGITS_BYTES = 250 * 10**6
"""Largest block of logits held at once; matrix products want many rows at a time."""
TILE_BYTES = {"cpu": 2**20}
"""Float32 logits that the softmax works on at once, per thread on a CPU, where they stay in its cache."""
OTHER_TILE_BYTES = 128 * 2**20
"""The same for devices whose kernels want large pieces."""
PIECE_BYTES = 2**20
"""Of a 16-bit weight gradient, that a CPU forms at once: what is turned over next to it must still be in its cache."""

NLL, LOSS, CORRECT, ENTROPY = range(4)
"""Rows of a (4, N) table: what is known of each trained position, before weights."""


def own_probability(nll: Tensor) -> Tensor:
    """The probability of each target: dynamic fine-tuning (Wu et al. 2025, arXiv:2508.05629)."""
    return (-nll).exp()


LOSSES: dict[str, Callable[[Tensor], Tensor] | None] = {"nll": None, "dft": own_probability}
"""Name → the weight of each token's loss as a function of its negative log-likelihood; `None` is 1.

The weight is a constant to the gradient, and of one row it may not depend on another.
"""


@dataclass(frozen=True)
class LossKind:
    """What is summed: weight · token_weight(nll) · ((1 - ε) · nll + ε · mean over the vocabulary of -log p)."""

    token_weight: Callable[[Tensor], Tensor] | None = None
    """An entry of `LOSSES`."""
    label_smoothing: float = 0.0
    """ε."""

    def scale(self, nll: Tensor, weights: Tensor | None) -> Tensor | None:
        """Factor of each row's loss and gradient; `None` for ones."""
        if self.token_weight is None:
            return weights
        own = self.token_weight(nll.detach())
        return own if weights is None else own * weights


def loss_kind(name: str = "nll", label_smoothing: float = 0.0) -> LossKind:
    """The loss that `loss_type` and `label_smoothing_factor` name.

    Raises: ConfigError for an unknown name, an impossible ε, or two objectives that nobody has defined together.
    """
    token_weight = lookup(LOSSES, name, "loss_type")
    if not 0.0 <= label_smoothing < 1.0:
        raise ConfigError(f"label_smoothing_factor: expected 0 or more and less than 1, got {label_smoothing}.")
    if label_smoothing and token_weight is not None:
        raise ConfigError(
            f"label_smoothing_factor: {label_smoothing} beside loss_type '{name}': the two are not defined together. "
            "Set one of them back."
        )
    return LossKind(token_weight, label_smoothing)


PLAIN = LossKind()
"""Negative log-likelihood."""


class TokenLoss(NamedTuple):
    """Sums over the trained positions of one batch, scalars on its device; nothing waits for them."""

    loss: Tensor
    """Σ weight · loss in nats, as its `LossKind` says; the only one that is differentiable."""
    nll: Tensor
    """Σ weight · nll in nats, whatever the loss: what perplexity is made of."""
    correct: Tensor
    """How many targets were the likeliest token; 0 unless asked for."""
    entropy: Tensor
    """Σ entropy in nats of the distribution over the vocabulary; 0 unless asked for."""


def head_loss(
    head: nn.Module,
    project: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    kind: LossKind = PLAIN,
    metrics: bool = False,
) -> TokenLoss:
    """The loss of `head` at rows of `hidden`.

    Args:
        head: the output projection; a plain linear layer takes the hand-written path.
        project: computes its logits, (N, H) → (N, V), for every other kind (LoRA on the head, 4-bit, ...).
        hidden: (N, H). targets: (N,) int64. weights: (N,) float32, or `None` for ones.
        kind: what to sum.
        metrics: also count likeliest tokens and sum entropies.
    """
    head = active_module(head)
    if type(head) is nn.Linear:
        return TokenLoss(*LinearCrossEntropy.apply(hidden, head.weight, head.bias, targets, weights, kind, metrics))
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return TokenLoss(*AnyHeadCrossEntropy.apply(project, hidden, targets, weights, kind, metrics, *parameters))


def active_module(head: nn.Module) -> nn.Module:
    """The module that really projects: peft wraps a head that is trained whole (`modules_to_save`)."""
    copies = getattr(head, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        active = head.active_adapters[0] if getattr(head, "active_adapters", None) else None
        if active in copies and not getattr(head, "disable_adapters", False):
            return copies[active]
        return head.original_module
    return head


def rows_per_block(vocabulary: int, bytes_per_logit: int = 4) -> int:
    """Rows whose logits fill `LOGITS_BYTES`, at least 16."""
    return max(16, LOGITS_BYTES // (bytes_per_logit * vocabulary))


def rows_per_tile(vocabulary: int, device: str) -> int:
    """Rows of float32 logits that one elementwise pass works on."""
    size = TILE_BYTES["cpu"] * torch.get_num_threads() if device == "cpu" else OTHER_TILE_BYTES
    return max(1, size // (4 * vocabulary))


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
        kind: LossKind,
        metrics: bool,
    ) -> tuple[Tensor, ...]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        given = (hidden, weight, bias)
        ctx.types = [None if tensor is None else tensor.dtype for tensor in given]
        ctx.grads = empty_gradients(given, ctx.needs_input_grad)
        with torch.autocast(device, enabled=False):
            operands = [None if tensor is None else tensor.to(dtype) for tensor in given]
            table = linear_loss(*operands, targets, weights, kind, metrics, ctx.grads)
        sums = summed(table, weights, kind)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_constants: Tensor | None) -> tuple:
        grads, ctx.grads = ctx.grads, None
        scaled = [None if grad is None else grad.mul_(grad_loss).to(dtype) for grad, dtype in zip(grads, ctx.types)]
        return (*scaled, None, None, None, None)


def empty_gradients(given: Sequence[Tensor | None], wanted: Sequence[bool]) -> list[Tensor | None]:
    """Where the gradients of hidden, weight and bias go: the first in its own type, sums over rows in float32.

    The first block of rows overwrites them, so only a batch without rows needs zeros.
    """
    types = (None, torch.float32, torch.float32)
    make = torch.empty_like if len(given[0]) else torch.zeros_like
    return [make(one, dtype=dtype) if want else None for one, dtype, want in zip(given, types, wanted)]


class Wanted(NamedTuple):
    """What the softmax over some rows must leave behind, beside their losses."""

    correct: bool
    entropy: bool
    error: bool
    """The gradient of the loss by the logits, in the memory of the logits."""


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor | None,
    kind: LossKind,
    metrics: bool,
    grads: Sequence[Tensor | None],
) -> Tensor:
    """The (4, N) table of all rows, all operands of one type; adds to `grads` of hidden, weight and bias."""
    # beside its gradient a row's entropy costs nothing, unless there is a bias
    by_product = metrics and grads[0] is not None and bias is None
    wanted = Wanted(metrics, metrics and not by_product, any(grad is not None for grad in grads))
    table = torch.zeros((4, len(hidden)), dtype=torch.float32, device=hidden.device)
    size = rows_per_block(len(weight), weight.element_size())
    memory = hidden.new_empty((min(size, len(hidden)), len(weight)))
    for begin in range(0, len(hidden), size):
        part = slice(begin, begin + size)
        found, rows = table[:, part], hidden[part]
        logits = memory[: len(rows)]  # (C, V)
        if bias is None:
            torch.mm(rows, weight.t(), out=logits)
        else:
            torch.addmm(bias, rows, weight.t(), out=logits)
        softmax_block(logits, targets[part], kind, wanted, found)
        if wanted.error:
            scale = kind.scale(found[NLL], None if weights is None else weights[part])
            product = add_gradients(grads, part, logits, rows, weight, scale)
            if by_product:
                # logits are linear in hidden, so hidden · (d loss / d hidden) = loss - entropy
                found[ENTROPY] = found[LOSS] - (product * rows.float()).sum(-1)
    return table


def softmax_block(logits: Tensor, targets: Tensor, kind: LossKind, wanted: Wanted, table: Tensor) -> None:
    """`softmax_tile` over rows of (C, V), as many at a time as the device likes."""
    size = rows_per_tile(logits.shape[1], logits.device.type)
    for begin in range(0, len(logits), size):
        part = slice(begin, begin + size)
        softmax_tile(logits[part], targets[part].unsqueeze(1), kind, wanted, table[:, part])


def softmax_tile(logits: Tensor, targets: Tensor, kind: LossKind, wanted: Wanted, table: Tensor) -> None:
    """Fill `table` (4, C) from `logits` (C, V) and `targets` (C, 1), and put the gradient where the logits were."""
    scores = logits.float()  # the same memory if they are float32
    if wanted.correct:
        top, likeliest = scores.max(-1, keepdim=True)
        table[CORRECT] = (likeliest == targets).squeeze(1)
    else:
        top = scores.amax(-1, keepdim=True)
    scores.sub_(top)
    at_target = scores.gather(1, targets)
    smoothing = kind.label_smoothing
    mean = scores.mean(-1, keepdim=True) if smoothing else 0.0
    powers = scores.exp() if wanted.entropy else scores.exp_()
    total = powers.sum(-1, keepdim=True)
    log_total = total.log()
    nll = log_total - at_target
    table[NLL] = nll.squeeze(1)
    table[LOSS] = (log_total - (1.0 - smoothing) * at_target - smoothing * mean).squeeze(1)
    if wanted.entropy:
        # clamped, or a token that cannot occur gives 0 · -inf
        table[ENTROPY] = (log_total - scores.clamp_(min=-200.0).mul_(powers).sum(-1, keepdim=True) / total).squeeze(1)
    if wanted.error:
        share = smoothing / logits.shape[1]
        probabilities = powers.div_(total)
        # one pass that computes and one that rounds: torch takes longer for both at once
        logits.copy_(probabilities.sub_(share) if smoothing else probabilities)
        # probability - 1 at the target, without the rounding of a subtraction
        logits.scatter_(1, targets, (torch.expm1(-nll) + (smoothing - share)).to(logits.dtype))


def add_gradients(
    grads: Sequence[Tensor | None], part: slice, error: Tensor, rows: Tensor, weight: Tensor, scale: Tensor | None
) -> Tensor | None:
    """Gradients of one block from `error` (C, V), the gradient of each row's loss by its logits.

    Returns: error @ weight (C, H), before `scale`; `None` if hidden needs no gradient.
    """
    grad_hidden, grad_weight, grad_bias = grads
    column = None if scale is None else scale.unsqueeze(1)
    first = part.start == 0
    if grad_bias is not None:
        _put(grad_bias, (error if column is None else error * column).sum(0, dtype=torch.float32), first)
    if grad_weight is not None:
        # weighting the short side (C, H) instead of the long one (C, V)
        _put_product(grad_weight, error, rows if column is None else (rows * column).to(rows.dtype), first)
    if grad_hidden is None:
        return None
    product = error @ weight
    grad_hidden[part] = product if column is None else product * column
    return product


def _put_product(total: Tensor, error: Tensor, rows: Tensor, first: bool) -> None:
    """Total (V, H) float32 = or += error.T (V, C) @ rows (C, H)."""
    if error.dtype == torch.float32:
        torch.addmm(total, error.t(), rows, beta=0 if first else 1, out=total)
    elif error.device.type != "cpu":
        _put(total, error.t() @ rows, first)
    else:
        # with tiles oneDNN takes twice as long if the long matrix is the transposed one: the result is turned instead
        columns, size = rows.t().contiguous() if has_tiles() else None, columns_per_piece(rows)
        for begin in range(0, len(total), size):
            piece = error[:, begin : begin + size]
            part = piece.t() @ rows if columns is None else (columns @ piece).t()
            _put(total[begin : begin + size], part, first)


def columns_per_piece(rows: Tensor) -> int:
    """Columns of (H, V) that fill `PIECE_BYTES`, a multiple of 32."""
    return max(1, PIECE_BYTES // (32 * rows.shape[1] * rows.element_size())) * 32


def _put(total: Tensor, part: Tensor, first: bool) -> None:
    """Begin a sum with its first part, or add another; no part is converted as a whole before it is added."""
    if first:
        total.copy_(part)
    else:
        total.add_(part)


def summed(table: Tensor, weights: Tensor | None, kind: LossKind) -> tuple[Tensor, ...]:
    """The fields of `TokenLoss` from what is known of each row."""
    loss = weighted_sum(table[LOSS], kind.scale(table[NLL], weights))
    return loss, weighted_sum(table[NLL], weights), table[CORRECT].sum(), table[ENTROPY].sum()


def weighted_sum(values: Tensor, weights: Tensor | None) -> Tensor:
    """Σ weight · value."""
    return (values if weights is None else values * weights).sum()


class AnyHeadCrossEntropy(torch.autograd.Function):
    """Head and loss in one, for any head: autograd runs inside the forward pass, a block of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        project: Callable[[Tensor], Tensor],
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        kind: LossKind,
        metrics: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        want_hidden, want_parameters = ctx.needs_input_grad[1], any(ctx.needs_input_grad[6:])
        table = torch.zeros((4, len(hidden)), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        grads = [torch.zeros_like(parameter) for parameter in parameters] if want_parameters else []
        begin, size = 0, 16  # the vocabulary shows with the first block
        while begin < len(hidden):
            part = slice(begin, begin + size)
            rows = hidden[part].detach().requires_grad_(want_hidden)
            with torch.set_grad_enabled(want_hidden or want_parameters):
                logits = project(rows).float()
                losses = row_losses(logits, targets[part], kind, metrics, table[:, part])
                scale = kind.scale(table[NLL, part], None if weights is None else weights[part])
                loss = weighted_sum(losses, scale)
            if want_hidden or want_parameters:
                leaves = [*([rows] if want_hidden else []), *(parameters if want_parameters else [])]
                found = list(torch.autograd.grad(loss, leaves, allow_unused=True))
                if want_hidden:
                    grad_hidden[part] = found.pop(0)
                _add_all(grads, found)
            begin, size = begin + size, rows_per_block(logits.shape[-1])
        ctx.grads = [grad_hidden, *(grads or [None] * len(parameters))]
        sums = summed(table, weights, kind)
        ctx.mark_non_differentiable(*sums[1:])
        return sums

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_constants: Tensor | None) -> tuple:
        grads, ctx.grads = ctx.grads, None
        grad_hidden, *rest = (None if grad is None else grad.mul_(grad_loss.to(grad.dtype)) for grad in grads)
        return (None, grad_hidden, None, None, None, None, *rest)


def _add_all(totals: Sequence[Tensor], parts: Sequence[Tensor | None]) -> None:
    for total, part in zip(totals, parts):
        if part is not None:
            total += part


def row_losses(logits: Tensor, targets: Tensor, kind: LossKind, metrics: bool, table: Tensor) -> Tensor:
    """Differentiable loss of each row of float32 `logits` (C, V), before weights; fills `table` (4, C)."""
    log_p = logits.log_softmax(-1)
    nll = -log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    loss = torch.lerp(nll, -log_p.mean(-1), kind.label_smoothing) if kind.label_smoothing else nll
    with torch.no_grad():
        table[NLL], table[LOSS] = nll, loss
        if metrics:
            table[CORRECT] = logits.max(-1).indices == targets
            table[ENTROPY] = -(log_p.exp() * log_p.clamp(min=-200.0)).sum(-1)
    return loss


def logits_loss(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    kind: LossKind = PLAIN,
    metrics: bool = False,
) -> TokenLoss:
    """The same sums from logits (N, V) that already exist: for models that reshape their head's output."""
    table = torch.zeros((4, len(logits)), dtype=torch.float32, device=logits.device)
    losses = row_losses(logits.float(), targets, kind, metrics, table)
    _, *constants = summed(table, weights, kind)
    return TokenLoss(weighted_sum(losses, kind.scale(table[NLL], weights)), *constants)
