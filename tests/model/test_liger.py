"""`use_liger_kernel`: a clear sentence where it cannot work, and never Liger's loss."""

import importlib.machinery
import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tunesmith.errors import ConfigError, ModelError
from tunesmith.model import liger
from tunesmith.model.liger import apply_liger, check_liger, liger_options


@pytest.fixture
def device(monkeypatch):
    """A machine with a CUDA device, as far as torch says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def package(monkeypatch, device):
    """A stand-in for liger-kernel that knows Llama and records what it was asked to do."""
    calls = []
    names = ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch")
    modules = [types.ModuleType(name) for name in names]
    for name, module in zip(names, modules):
        module.__spec__, module.__path__ = importlib.machinery.ModuleSpec(name, None), []
        monkeypatch.setitem(sys.modules, name, module)
    modules[1]._apply_liger_kernel_to_instance = lambda model, **options: calls.append((model, options))
    modules[2].MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    return calls


# trainer: J4 B12
def test_without_a_device_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"use_liger_kernel: .* need a CUDA device; torch sees none here. Leave it out"
    ):
        check_liger()


# trainer: J4 B12
def test_without_the_package_its_name_is_said(monkeypatch, device):
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"liger-kernel is not installed\. Run `pip install liger-kernel`"):
        check_liger()


# trainer: J4 B12
def test_liger_gets_the_base_model_and_leaves_the_loss_alone(package, tiny_model):
    apply_liger(get_peft_model(tiny_model, LoraConfig(r=2, target_modules=["q_proj"])))
    apply_liger(tiny_model, {"rope": False})
    off = {"fused_linear_cross_entropy": False, "cross_entropy": False}
    assert [model is tiny_model for model, _ in package] == [True, True]
    assert [options for _, options in package] == [off, {"rope": False, **off}]


# trainer: J4
def test_an_unknown_family_is_refused(package, tiny_model):
    tiny_model.config.model_type = "unheard_of"
    with pytest.raises(ModelError, match="Liger has no kernels for models of type 'unheard_of'"):
        apply_liger(tiny_model)


# trainer: J4
@pytest.mark.parametrize("name", ["fused_linear_cross_entropy", "cross_entropy"])
def test_ligers_losses_are_refused(name):
    with pytest.raises(ConfigError, match=f"liger_kernel_config: {name} would take the loss"):
        liger_options({name: True})
