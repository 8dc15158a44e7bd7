"""What trains, by name and number."""

import pytest
import torch
from peft import LoraConfig

from tunesmith.config import ModelFields
from tunesmith.errors import ConfigError
from tunesmith.model.adapt import ADAPTERS, adapt, attach, count_parameters, upcast_trainable


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_every_adapter_trains_something_and_the_model_still_runs(tiny_model, name):
    model = adapt(tiny_model, ModelFields(adapter=name, freeze_trainable_layers=1))
    assert trained(model)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 259)


def test_full_trains_all(tiny_model):
    adapt(tiny_model.requires_grad_(False), ModelFields(adapter="full"))
    assert count_parameters(tiny_model) == (29_024, 29_024)


@pytest.mark.parametrize(
    ("count", "layers"), [(1, {11}), (2, {10, 11}), (-1, {0}), (-2, {0, 1}), (12, set(range(12)))]
)
def test_freeze_counts_layers_exactly(make_tiny_model, count, layers):
    """`1.mlp` is no part of layer 11: names are not matched by their endings."""
    model = adapt(make_tiny_model(num_hidden_layers=12), ModelFields(adapter="freeze", freeze_trainable_layers=count))
    assert {int(name.split(".")[2]) for name in trained(model)} == layers


def test_freeze_trains_the_named_parts(tiny_model):
    config = ModelFields(adapter="freeze", freeze_trainable_layers=-1, freeze_trainable_modules=["mlp"])
    names = {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert trained(adapt(tiny_model, config)) == names


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"freeze_trainable_layers": 3}, "3 does not name 1 to 2 of the model's layers"),
        ({"freeze_trainable_layers": 0}, "0 does not name"),
        ({"freeze_trainable_modules": ["mpl"]}, "no 'mpl'. Did you mean 'mlp'"),
    ],
)
def test_freeze_names_what_is_wrong(tiny_model, options, words):
    with pytest.raises(ConfigError, match=words):
        adapt(tiny_model, ModelFields(adapter="freeze", **options))


def test_lora_takes_the_options(tiny_model):
    model = adapt(tiny_model, ModelFields(lora_r=3, lora_alpha=6, lora_target_modules=["q_proj"], use_rslora=True))
    assert {name.split(".")[-3] for name in trained(model)} == {"lora_A", "lora_B"}
    assert model.peft_config["default"].r == 3
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == pytest.approx(6 / 3**0.5)


def test_the_callers_peft_config_stays_as_it_is(tiny_model):
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    before = config.to_dict()
    attach(tiny_model, config)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("option", "name", "words"),
    [
        ("modules_to_save", "embed_token", "no module 'embed_token'. Did you mean 'embed_tokens'"),
        ("target_modules", "q_porj", "no module 'q_porj'. Did you mean 'q_proj'"),
    ],
)
def test_names_that_match_nothing_are_errors(tiny_model, option, name, words):
    config = LoraConfig(**{"target_modules": ["q_proj"], option: [name]}, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=words):
        attach(tiny_model, config)


def test_an_unknown_adapter_names_the_nearest(tiny_model):
    with pytest.raises(ConfigError, match=r"unknown adapter 'loar'. Did you mean 'lora'"):
        adapt(tiny_model, ModelFields(adapter="loar"))


def test_only_trained_half_precision_is_upcast(tiny_model):
    model = tiny_model.to(torch.bfloat16).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert upcast_trainable(model) == 1
    assert model.lm_head.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
