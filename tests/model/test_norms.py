"""Norms in float32 on a half-precision base: which, and that the model still runs."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tests.model.folders import IDS, for_training, logits, save_base
from tests.train.rows import make_trainer, token_rows
from tunesmith.model.norms import hold_norms_in_float32

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def base(tmp_path, tiny_model, byte_tokenizer):
    return save_base(tmp_path / "base", tiny_model, byte_tokenizer, torch.bfloat16)


# workflow: M6
def test_norms_of_a_frozen_half_precision_base_are_held_in_float32(base):
    said = []
    model = for_training(said.append, model_name_or_path=base, dtype="bfloat16", upcast_layernorm=True)
    types = {name: parameter.dtype for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name for name, dtype in types.items() if dtype == torch.float32} == {
        name for name in types if "norm" in name
    }
    assert said == ["upcast_layernorm: 5 norm tensors held in float32"]


# workflow: M6
@pytest.mark.parametrize("autocast", [False, True])
def test_the_model_runs_with_and_without_autocast(base, autocast):
    plain = for_training(model_name_or_path=base, dtype="bfloat16")
    model = for_training(model_name_or_path=base, dtype="bfloat16", upcast_layernorm=True)
    seen = []
    model.get_base_model().model.layers[0].self_attn.q_proj.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, expected = model(IDS), plain(IDS)
    assert seen[0].dtype == torch.bfloat16  # flash kernels take queries in half precision only
    assert torch.allclose(found.logits.float(), expected.logits.float(), atol=3e-2)
    found.logits.float().sum().backward()


# workflow: M6
@pytest.mark.parametrize("bf16", [False, True])
def test_a_trainer_takes_such_a_model(base, byte_tokenizer, tmp_path, bf16):
    model = for_training(model_name_or_path=base, dtype="bfloat16", upcast_layernorm=True)
    trainer = make_trainer(model, byte_tokenizer, token_rows(), tmp_path / "run", max_steps=2, bf16=bf16)
    assert trainer.train().training_loss > 0


# workflow: M6
def test_layer_norms_are_named_in_other_ways_too():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50)).bfloat16().requires_grad_(False)
    before = logits(model, IDS)
    assert hold_norms_in_float32(model) == 2  # weight and bias of ln_f; ln_1 and ln_2 go by none of the names
    assert torch.allclose(logits(model, IDS), before, atol=3e-2)
    assert hold_norms_in_float32(model) == 0


def test_norms_that_train_or_are_float32_already_are_left_alone(tiny_model):
    assert hold_norms_in_float32(tiny_model) == 0
    assert hold_norms_in_float32(tiny_model.bfloat16()) == 0
    assert not any(module._forward_hooks for module in tiny_model.modules() if isinstance(module, nn.Module))
