"""Our loss equals `F.cross_entropy` on full logits, in value and in every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tunesmith.train import loss as losses
from tunesmith.train.loss import head_loss, logits_loss, rows_per_block

N, H, V = 37, 8, 101


def inputs(weights: bool, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    scale = torch.rand(N, generator=generator) if weights else None
    return hidden, targets, scale


def expected(head, hidden, targets, scale):
    logits = head(hidden).float()
    nll = F.cross_entropy(logits, targets, reduction="none")
    return (nll if scale is None else nll * scale).sum(), (logits.argmax(-1) == targets).sum()


class Scaled(nn.Linear):
    """A head that is not plainly linear."""

    def forward(self, hidden):
        return 3.0 * torch.tanh(super().forward(hidden))


@pytest.mark.parametrize("chunk", [4, 16, 1000])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Scaled])
def test_value_and_gradients_equal_cross_entropy(monkeypatch, kind, bias, weights, chunk):
    monkeypatch.setattr(losses, "rows_per_block", lambda *_: chunk)
    torch.manual_seed(0)
    head = kind(H, V, bias=bias)
    hidden, targets, scale = inputs(weights)
    found = head_loss(head, head.forward, hidden, targets, scale, metrics=True)
    (found.loss * 0.25).backward()
    ours = [hidden.grad, *(parameter.grad for parameter in head.parameters())]
    hidden.grad = None
    head.zero_grad()
    value, correct = expected(head, hidden, targets, scale)
    (value * 0.25).backward()
    torch.testing.assert_close(found.loss, value)
    assert found.correct == correct
    for mine, theirs in zip(ours, [hidden.grad, *(parameter.grad for parameter in head.parameters())]):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_what_is_frozen_gets_no_gradient(frozen):
    head = nn.Linear(H, V, bias=False)
    hidden, targets, scale = inputs(False)
    (head if frozen == "head" else hidden).requires_grad_(False)
    head_loss(head, head.forward, hidden, targets, scale).loss.backward()
    assert (head.weight.grad is None) == (frozen == "head")
    assert (hidden.grad is None) == (frozen == "hidden")


def test_without_gradients_the_value_is_the_same():
    head = nn.Linear(H, V)
    hidden, targets, scale = inputs(True)
    with torch.no_grad():
        found = head_loss(head, head.forward, hidden, targets, scale)
    torch.testing.assert_close(found.loss, expected(head, hidden, targets, scale)[0].detach())


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32():
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=False)
    hidden, targets, _ = inputs(False)
    with torch.autocast("cpu", torch.bfloat16):
        found = head_loss(head, head.forward, hidden, targets)
    found.loss.backward()
    assert found.loss.dtype == head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(found.loss, expected(head, hidden, targets, None)[0], rtol=1e-2, atol=1e-2)


def test_no_rows_give_a_loss_of_zero_that_still_reaches_the_weights():
    head = nn.Linear(H, V)
    hidden = torch.zeros(0, H, requires_grad=True)
    found = head_loss(head, head.forward, hidden, torch.zeros(0, dtype=torch.int64))
    found.loss.backward()
    assert found.loss == 0
    assert head.weight.grad.abs().sum() == 0


def test_existing_logits_give_the_same_sums():
    head = nn.Linear(H, V)
    hidden, targets, scale = inputs(True)
    found = logits_loss(head(hidden), targets, scale, metrics=True)
    value, correct = expected(head, hidden, targets, scale)
    torch.testing.assert_close(found.loss, value)
    assert found.correct == correct


def test_logits_stay_within_their_budget():
    assert all(
        rows_per_block(vocabulary) * vocabulary * 4 <= losses.LOGITS_BYTES for vocabulary in (1000, 49152, 262144)
    )
    assert rows_per_block(10**9) == 16
