"""Linear layers with turned weight gradients give what autocast gives, and step aside elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tunesmith.model import turned_linear
from tunesmith.model.compiled import CompiledLayers
from tunesmith.model.turned_linear import gains, turned_forward


def gradients(forward, layer, x):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        result = forward(x)
    result.float().square().sum().backward()
    return result, x.grad, *(parameter.grad for parameter in layer.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 96), (96, 32), (64, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_and_gradients_are_those_of_autocast(dtype, inputs, outputs, bias):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=bias)
    x = torch.randn(1, 45, inputs).to(dtype)
    ours = gradients(lambda x: turned_forward(layer, x), layer, x)
    theirs = gradients(layer, layer, x)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, other, rtol=1.6e-2, atol=1e-2 * other.abs().max().item())


def test_without_autocast_the_layer_is_as_it_was():
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 24), torch.randn(3, 8)
    assert torch.equal(turned_forward(layer, x), F.linear(x, layer.weight, layer.bias))


def test_only_plain_layers_that_train_and_are_not_nearly_square_gain(monkeypatch):
    monkeypatch.setattr(turned_linear, "has_tiles", lambda: True)
    assert gains(nn.Linear(8, 24))
    assert gains(nn.Linear(24, 8))
    assert gains(nn.Linear(1024, 1024, device="meta"))
    assert not gains(nn.Linear(16, 24))
    assert not gains(nn.Linear(8, 24).requires_grad_(False))
    assert not gains(nn.Embedding(8, 24))
    replaced = nn.Linear(8, 24)
    replaced.forward = lambda x: x
    assert not gains(replaced)
    monkeypatch.setattr(turned_linear, "has_tiles", lambda: False)
    assert not gains(nn.Linear(8, 24))


def test_a_model_has_its_own_layers_again_afterwards(monkeypatch, tiny_model):
    monkeypatch.setattr("tunesmith.model.compiled.gains", lambda module: type(module) is nn.Linear)
    model = tiny_model
    compiled = CompiledLayers(model)
    assert len(compiled.linears) > 0
    with compiled.run():
        assert all("forward" in layer.__dict__ for layer, _ in compiled.linears)
    assert not any("forward" in module.__dict__ for module in model.modules())
