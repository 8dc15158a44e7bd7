"""Our losses equal the formulas on full logits, in value and in every gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.trainer_pt_utils import LabelSmoother

from tunesmith.errors import ConfigError
from tunesmith.train import loss as losses
from tunesmith.train.loss import LOSSES, LossKind, head_loss, logits_loss, loss_kind, rows_per_block, rows_per_tile

N, H, V = 37, 8, 101
KINDS = {"nll": LossKind(), "dft": loss_kind("dft"), "smoothed": loss_kind("nll", 0.1)}


def inputs(weights: bool, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    scale = torch.rand(N, generator=generator) if weights else None
    return hidden, targets, scale


def expected(head, hidden, targets, scale, kind="nll"):
    """(loss, nll, correct, entropy) by the textbook."""
    logits = head(hidden).float()
    log_p = logits.log_softmax(-1)
    nll = F.cross_entropy(logits, targets, reduction="none")
    loss = {
        "nll": nll,
        "dft": (-nll.detach()).exp() * nll,
        "smoothed": 0.9 * nll - 0.1 * log_p.mean(-1),
    }[kind]
    scale = torch.ones(len(targets)) if scale is None else scale
    correct = (logits.argmax(-1) == targets).sum()
    return (loss * scale).sum(), (nll * scale).sum(), correct, -(log_p.exp() * log_p).sum()


class Scaled(nn.Linear):
    """A head that is not plainly linear."""

    def forward(self, hidden):
        return 3.0 * torch.tanh(super().forward(hidden))


class Embedded(nn.Linear):
    """The same as a plain linear layer, and still no `nn.Linear`."""


def blocks_of(monkeypatch, rows):
    monkeypatch.setattr(losses, "rows_per_block", lambda *_: rows)
    monkeypatch.setattr(losses, "rows_per_tile", lambda *_: max(1, rows // 3))


def gradients(loss, *leaves):
    for leaf in leaves:
        leaf.grad = None
    (loss * 0.25).backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("rows", [4, 16, 1000])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("head_type", [nn.Linear, Embedded, Scaled])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_and_gradients_equal_the_formula(monkeypatch, kind, head_type, bias, weights, rows):
    blocks_of(monkeypatch, rows)
    torch.manual_seed(0)
    head = head_type(H, V, bias=bias)
    hidden, targets, scale = inputs(weights)
    leaves = [hidden, *head.parameters()]
    found = head_loss(head, head.forward, hidden, targets, scale, kind=KINDS[kind], metrics=True)
    mine = gradients(found.loss, *leaves)
    sums = expected(head, hidden, targets, scale, kind)
    for ours, theirs in zip(found, sums):
        torch.testing.assert_close(ours, theirs, check_dtype=False)
    for ours, theirs in zip(mine, gradients(sums[0], *leaves)):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_existing_logits_give_the_same_sums_and_gradients(kind):
    head = nn.Linear(H, V)
    hidden, targets, scale = inputs(True)
    found = logits_loss(head(hidden), targets, scale, kind=KINDS[kind], metrics=True)
    mine = gradients(found.loss, hidden, head.weight)
    sums = expected(head, hidden, targets, scale, kind)
    for ours, theirs in zip(found, sums):
        torch.testing.assert_close(ours, theirs, check_dtype=False)
    for ours, theirs in zip(mine, gradients(sums[0], hidden, head.weight)):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_smoothing_is_that_of_transformers():
    head = nn.Linear(H, V)
    hidden, targets, _ = inputs(False)
    found = head_loss(head, head.forward, hidden, targets, kind=loss_kind("nll", 0.25))
    reference = LabelSmoother(epsilon=0.25)({"logits": head(hidden)}, targets.unsqueeze(1).squeeze(1))
    torch.testing.assert_close(found.loss / N, reference)


def test_dft_weighs_each_token_by_its_own_probability():
    head = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[math.log(3.0)], [0.0]]))  # softmax: 3/4 and 1/4
    hidden = torch.ones(2, 1)
    found = head_loss(head, head.forward, hidden, torch.tensor([0, 1]), kind=loss_kind("dft"))
    assert found.loss.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert found.nll.item() == pytest.approx(-math.log(0.75) - math.log(0.25))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_the_table_lowers_itself(name):
    torch.manual_seed(0)
    head = nn.Linear(H, V)
    hidden, targets, _ = inputs(False)
    before = head_loss(head, head.forward, hidden, targets, kind=loss_kind(name))
    before.loss.backward()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter -= 1e-2 * parameter.grad
        after = head_loss(head, head.forward, hidden, targets, kind=loss_kind(name))
    assert after.nll < before.nll


def test_a_person_can_bring_a_token_weight(tmp_path):
    own = tmp_path / "mine.py"
    own.write_text("def half(nll):\n    return 0.5 * nll.new_ones(nll.shape)\n")
    head = nn.Linear(H, V)
    hidden, targets, scale = inputs(True)
    found = head_loss(head, head.forward, hidden, targets, scale, kind=loss_kind(f"{own}:half"))
    torch.testing.assert_close(found.loss, 0.5 * found.nll)


def test_unknown_and_impossible_losses_are_refused():
    with pytest.raises(ConfigError, match=r"unknown loss_type 'dtf'. Did you mean 'dft'\? Known: dft, nll."):
        loss_kind("dtf")
    with pytest.raises(ConfigError, match="label_smoothing_factor: expected 0 or more and less than 1, got 1"):
        loss_kind("nll", 1.0)
    with pytest.raises(ConfigError, match="beside loss_type 'dft': the two are not defined together"):
        loss_kind("dft", 0.1)


@pytest.mark.parametrize("head_type", [nn.Linear, Embedded])
@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_what_is_frozen_gets_no_gradient(head_type, frozen):
    head = head_type(H, V, bias=False)
    hidden, targets, scale = inputs(False)
    (head if frozen == "head" else hidden).requires_grad_(False)
    found = head_loss(head, head.forward, hidden, targets, scale, metrics=True)
    found.loss.backward()
    torch.testing.assert_close(found.entropy, expected(head, hidden, targets, None)[3])
    assert (head.weight.grad is None) == (frozen == "head")
    assert (hidden.grad is None) == (frozen == "hidden")


class Products(TorchDispatchMode):
    """Counts matrix products that run inside."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function.overloadpacket.__name__ in ("mm", "addmm", "addmm_")
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(("frozen", "products"), [("head", 2), ("hidden", 2), ("none", 3), ("both", 1)])
def test_no_matrix_product_is_computed_in_vain(frozen, products):
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=False).requires_grad_(frozen not in ("head", "both"))
    hidden, targets, _ = inputs(False)
    hidden = hidden[:16].detach().requires_grad_(frozen not in ("hidden", "both"))
    for module in (head, nn.Sequential(head)):
        with Products() as counter:
            head_loss(module, module.forward, hidden, targets[:16], metrics=True)
        assert counter.count == products


@pytest.mark.parametrize("head_type", [nn.Linear, Embedded])
def test_without_gradients_the_sums_are_the_same(head_type):
    head = head_type(H, V)
    hidden, targets, scale = inputs(True)
    with torch.no_grad():
        found = head_loss(head, head.forward, hidden, targets, scale, metrics=True)
        for ours, theirs in zip(found, expected(head, hidden, targets, scale)):
            torch.testing.assert_close(ours, theirs, check_dtype=False)


@pytest.mark.parametrize("tiles", [True, False], ids=["turned", "as it is"])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_multiplies_in_bfloat16_and_sums_in_float32(monkeypatch, kind, tiles):
    monkeypatch.setattr(losses, "has_tiles", lambda: tiles)
    monkeypatch.setattr(losses, "PIECE_BYTES", 1)  # several pieces
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=False)
    hidden, targets, scale = inputs(True)
    with torch.autocast("cpu", torch.bfloat16):
        found = head_loss(head, head.forward, hidden, targets, scale, kind=KINDS[kind], metrics=True)
    mine = gradients(found.loss, hidden, head.weight)
    assert found.loss.dtype == found.entropy.dtype == head.weight.grad.dtype == torch.float32
    sums = expected(head, hidden, targets, scale, kind)
    for ours, theirs in zip((found.loss, found.nll, found.entropy), (sums[0], sums[1], sums[3])):
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=1e-2)
    for ours, theirs in zip(mine, gradients(sums[0], hidden, head.weight)):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-2)


def test_tied_heads_collect_both_gradients():
    torch.manual_seed(0)
    embeddings, head = nn.Embedding(V, H), nn.Linear(H, V, bias=False)
    head.weight = embeddings.weight
    ids, (_, targets, scale) = torch.arange(N), inputs(True)
    found = head_loss(head, head.forward, embeddings(ids), targets, scale)
    mine = gradients(found.loss, embeddings.weight)[0]
    theirs = gradients(expected(head, embeddings(ids), targets, scale)[0], embeddings.weight)[0]
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("head_type", [nn.Linear, Embedded])
def test_no_rows_give_a_loss_of_zero_that_still_reaches_the_weights(head_type):
    head = head_type(H, V)
    hidden = torch.zeros(0, H, requires_grad=True)
    found = head_loss(head, head.forward, hidden, torch.zeros(0, dtype=torch.int64), metrics=True)
    found.loss.backward()
    assert [figure.item() for figure in found] == [0, 0, 0, 0]
    assert head.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("bias", [True, False])
def test_a_token_that_cannot_occur_does_not_spoil_the_entropy(bias):
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert logits_loss(logits, torch.tensor([0]), metrics=True).entropy.item() == pytest.approx(math.log(2))
    head = nn.Linear(1, 3)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(logits[0])
    hidden = torch.ones(1, 1, requires_grad=bias)
    found = head_loss(head, head.forward, hidden, torch.tensor([0]), metrics=True)
    assert found.entropy.item() == pytest.approx(math.log(2))


def test_nothing_but_the_loss_is_counted_unless_asked():
    head = nn.Linear(H, V)
    found = head_loss(head, head.forward, *inputs(False)[:2])
    assert found.correct == found.entropy == 0
    assert [figure.requires_grad for figure in found] == [True, False, False, False]


def test_logits_stay_within_their_budget():
    for vocabulary in (1000, 49152, 262144):
        assert rows_per_block(vocabulary) * vocabulary * 4 <= losses.LOGITS_BYTES
        assert rows_per_block(vocabulary, 2) // 2 == rows_per_block(vocabulary)
        assert rows_per_tile(vocabulary, "cpu") < rows_per_tile(vocabulary, "cuda")
    assert rows_per_block(10**9) == 16
    assert rows_per_tile(10**9, "cpu") == 1
