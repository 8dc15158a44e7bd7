"""The loss formed inside the model's head: the model runs as usual, but its head returns a loss instead of logits.

So wrappers around `forward` (DDP, FSDP, autocast, peft) work as they always do, and no (T, V) tensor exists.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from tunesmith.train.loss import PLAIN, LossKind, TokenLoss, head_loss, logits_loss


@dataclass
class HeadLoss:
    """Where the loss of one forward pass is formed, which, and what came of it."""

    index: Tensor
    """(N,) flat positions whose hidden state predicts a trained token."""
    targets: Tensor
    """(N,) those tokens."""
    weights: Tensor | None = None
    """(N,) weight of each, or `None` for ones."""
    plain_head: bool = True
    """The model returns its head's output unchanged; otherwise the loss is formed from what it returns."""
    kind: LossKind = PLAIN
    metrics: bool = False
    """Also count likeliest tokens and sum entropies."""
    found: TokenLoss | None = None

    def from_logits(self, logits: Tensor) -> TokenLoss:
        """The sums, from the model's `logits`: the loss itself where the head formed it, else (1, N, V)."""
        if self.plain_head:
            return self.found._replace(loss=logits.reshape(()))
        rows = logits.reshape(-1, logits.shape[-1])
        return logits_loss(rows, self.targets, self.weights, kind=self.kind, metrics=self.metrics)


@contextmanager
def loss_in_head(head: nn.Module, request: HeadLoss) -> Iterator[HeadLoss]:
    """Inside, `head` looks only at `request.index`, and returns the summed loss as (1, 1, 1) if the head is plain.

    Only this module object is touched, only for the duration of one forward pass.
    """
    project, own = head.forward, head.__dict__.get("forward")

    def forward(hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])[request.index]
        if not request.plain_head:
            return project(rows.unsqueeze(0))
        loss = head_loss(
            head, project, rows, request.targets, request.weights, kind=request.kind, metrics=request.metrics
        )
        request.found = loss._replace(loss=loss.loss.detach())
        return loss.loss.reshape(1, 1, 1)

    head.forward = forward
    try:
        yield request
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own
