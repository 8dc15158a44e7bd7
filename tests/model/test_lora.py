"""LoRA's inputs under autocast."""

import pytest
import torch
from peft import LoraConfig

from tests import tiny
from tunesmith.model.adapt import attach, upcast_trainable
from tunesmith.model.lora import casting_layers, inputs_left_to_autocast

IDS = torch.arange(20).unsqueeze(0)


def wrapped(**options):
    base = tiny.make_tiny_model().to(torch.bfloat16)
    model = attach(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options))
    upcast_trainable(model)
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    return model


def gradients(model):
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_the_same_bit_for_bit():
    expected, model = gradients(wrapped()), wrapped()
    layers = casting_layers(model)
    assert len(layers) == 14  # seven in each of two layers
    with inputs_left_to_autocast(layers):
        found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_inputs_stay_in_half_precision_inside_and_are_cast_outside():
    model, seen = wrapped(), []
    layers = casting_layers(model)
    layers[0].lora_A["default"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        with inputs_left_to_autocast(layers):
            model(IDS)
        model(IDS)
    assert seen == [torch.bfloat16, torch.float32]


def test_an_error_inside_leaves_layers_as_they_were():
    layers = casting_layers(wrapped())
    with pytest.raises(KeyError), inputs_left_to_autocast(layers):
        raise KeyError
    assert all(layer.cast_input_dtype_enabled for layer in layers)


def test_dora_is_left_alone():
    assert casting_layers(wrapped(use_dora=True)) == []
