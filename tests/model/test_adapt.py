"""What trains, by name and number."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.train.rows import assert_same, first_gradients, make_trainer, reference_gradients, token_rows
from tunesmith.config import ModelFields
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.adapt import ADAPTERS, adapt, attach, check_trainable, count_parameters, upcast_trainable
from tunesmith.model.chain import put_on
from tunesmith.model.load import load_model
from tunesmith.model.lora import loraplus_groups, save_plain_lora
from tunesmith.model.quantize import require_input_grads

LORA = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
IDS = torch.arange(20).unsqueeze(0)


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_every_adapter_trains_something_and_the_model_still_runs(tiny_model, name):
    model = adapt(tiny_model, ModelFields(adapter=name, freeze_trainable_layers=1))
    assert trained(model)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 259)


# workflow: M7
def test_full_trains_all(tiny_model):
    adapt(tiny_model.requires_grad_(False), ModelFields(adapter="full"))
    assert count_parameters(tiny_model) == (29_024, 29_024)


# workflow: M7
@pytest.mark.parametrize(
    ("count", "layers"), [(1, {11}), (2, {10, 11}), (-1, {0}), (-2, {0, 1}), (12, set(range(12)))]
)
def test_freeze_counts_layers_exactly(make_tiny_model, count, layers):
    """`1.mlp` is no part of layer 11: names are not matched by their endings."""
    model = adapt(make_tiny_model(num_hidden_layers=12), ModelFields(adapter="freeze", freeze_trainable_layers=count))
    assert {int(name.split(".")[2]) for name in trained(model)} == layers


MLP = {f"mlp.{part}_proj" for part in ("gate", "up", "down")}
ATTENTION = {f"self_attn.{part}_proj" for part in "qkvo"}
NORMS = {"input_layernorm", "post_attention_layernorm"}


# workflow: M7
@pytest.mark.parametrize(
    ("names", "parts", "count"),
    [
        (["mlp"], MLP, 3 * 32 * 32),
        (["self_attn"], ATTENTION, 3 * 32 * 32),
        (["self_attention"], ATTENTION, 3 * 32 * 32),  # as Bloom, Falcon and ChatGLM call it
        (["mlp", "input_layernorm"], MLP | {"input_layernorm"}, 3 * 32 * 32 + 32),
        (["all"], MLP | ATTENTION | NORMS, 6 * 32 * 32 + 64),
        (None, MLP | ATTENTION | NORMS, 6 * 32 * 32 + 64),
    ],
)
def test_freeze_trains_the_named_parts(tiny_model, names, parts, count):
    config = ModelFields(adapter="freeze", freeze_trainable_layers=-1, freeze_trainable_modules=names)
    model = adapt(tiny_model, config)
    assert trained(model) == {f"model.layers.0.{part}.weight" for part in parts}
    assert count_parameters(model)[0] == count


def test_parts_that_only_some_layers_have(make_tiny_model):
    model = make_tiny_model(num_hidden_layers=3)
    model.model.layers[1].experts = nn.Linear(2, 2)
    config = {"adapter": "freeze", "freeze_trainable_modules": ["experts"]}
    assert {name.split(".")[2] for name in trained(adapt(model, ModelFields(**config)))} == {"1"}
    with pytest.raises(ConfigError, match="layers have no 'experts'"):
        adapt(model, ModelFields(**config, freeze_trainable_layers=1))


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


# workflow: M7
def test_lora_takes_the_options(tiny_model):
    model = adapt(
        tiny_model,
        ModelFields(lora_dropout=0.1, lora_r=3, lora_alpha=6, lora_target_modules=["q_proj"], use_rslora=True),
    )
    assert {name.split(".")[-3] for name in trained(model)} == {"lora_A", "lora_B"}
    assert model.peft_config["default"].r == 3
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(6 / 3**0.5)
    assert (layer.lora_dropout["default"].p, model.peft_config["default"].task_type) == (0.1, "CAUSAL_LM")


class PackedAttention(nn.Module):
    """One projection for queries, keys and values, by Baichuan's name for it."""

    def __init__(self):
        super().__init__()
        self.W_pack = nn.Linear(32, 96, bias=False)

    def forward(self, hidden_states, **kwargs):
        query, key, value = self.W_pack(hidden_states).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True), None


# workflow: M7
@pytest.mark.parametrize("targets", [["W_pack"], "W_pack", "W_pack, gate_proj"])
def test_lora_takes_any_modules_name(tiny_model, targets):
    for layer in tiny_model.model.layers:
        layer.self_attn = PackedAttention()
    model = adapt(tiny_model, ModelFields(lora_r=2, lora_target_modules=targets))
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in trained(model)}
    assert names == {"W_pack", "gate_proj"} if "," in targets else names == {"W_pack"}
    model(IDS).logits.sum().backward()
    assert model.base_model.model.model.layers[0].self_attn.W_pack.lora_B.default.weight.grad.abs().sum() > 0


# workflow: M7
@pytest.mark.parametrize("targets", ["all", ["all"], "all-linear"])
def test_all_is_every_linear_layer_but_the_head(tiny_model, targets):
    model = adapt(tiny_model, ModelFields(lora_target_modules=targets))
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained(model)} == {
        f"{part}_proj" for part in (*"qkvo", "gate", "up", "down")
    }


def test_a_pattern_stays_one(tiny_model):
    model = adapt(tiny_model, ModelFields(lora_target_modules=r".*layers\.1.*\.(q|v)_proj"))
    assert len(trained(model)) == 4


def test_the_callers_peft_config_stays_as_it_is(tiny_model):
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    before = config.to_dict()
    attach(tiny_model, config)
    assert config.to_dict() == before


# trainer: H2
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


# ---- peft_config


# trainer: H2 A10
def test_only_the_adapter_and_the_saved_modules_train(tiny_model, byte_tokenizer, tmp_path):
    """The page's snippet, its `embed_token` spelled right (contradiction 8)."""
    config = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, modules_to_save=["lm_head", "embed_tokens"], bias="none", **LORA
    )
    trainer = make_trainer(tiny_model, byte_tokenizer, token_rows(), tmp_path, peft_config=config, max_steps=2)
    assert isinstance(trainer.model, PeftModel)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    changed = {name for name, parameter in before.items() if not torch.equal(parameter, after[name])}
    assert changed == trained(trainer.model)
    assert {name for name in changed if "lora_" not in name} == {
        "base_model.model.lm_head.modules_to_save.default.weight",
        "base_model.model.model.embed_tokens.modules_to_save.default.weight",
    }


# trainer: H2
@pytest.mark.parametrize("wrong", [{"r": 8}, "lora", LoraConfig])
def test_a_peft_config_of_another_type_is_named(tiny_model, wrong):
    with pytest.raises(
        ValueError, match=rf"expected a peft.PeftConfig such as LoraConfig, got {type(wrong).__name__}"
    ):
        attach(tiny_model, wrong)


# trainer: H4
def test_a_second_adapter_is_refused_with_two_ways_out(tiny_model):
    wrapped = attach(tiny_model, LoraConfig(**LORA))
    with pytest.raises(ConfigError, match=r"has an adapter already. Leave peft_config out to.*merge_and_unload\(\)"):
        attach(wrapped, LoraConfig(**LORA))
    attach(wrapped.merge_and_unload(), LoraConfig(**LORA))


def test_an_adapter_that_transformers_added_is_one_too(tiny_model):
    tiny_model.add_adapter(LoraConfig(**LORA))
    with pytest.raises(ConfigError, match="has an adapter already"):
        attach(tiny_model, LoraConfig(**LORA))


# trainer: H4
def test_a_peft_model_goes_on_training_its_own_adapter(tiny_model, byte_tokenizer, tmp_path):
    wrapped = get_peft_model(tiny_model, LoraConfig(**LORA))
    check_trainable(wrapped)
    names = trained(wrapped)
    before = {name: parameter.detach().clone() for name, parameter in wrapped.named_parameters() if name in names}
    trainer = make_trainer(wrapped, byte_tokenizer, token_rows(), tmp_path, max_steps=2)
    trainer.train()
    assert trainer.model is wrapped
    assert all(not torch.equal(wrapped.get_parameter(name), old) for name, old in before.items())


# trainer: H4
def test_a_frozen_adapter_is_refused(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "base")
    get_peft_model(tiny_model, LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(ModelError, match=r"every weight of the model's adapter is frozen.* is_trainable=True"):
        check_trainable(PeftModel.from_pretrained(base, tmp_path / "adapter"))


class Shaped(nn.Module):
    """No `PreTrainedModel`, but with what a trainer asks of one, as other libraries' wrappers are."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, **inputs):
        return self.inner(**inputs)

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return self.inner.prepare_inputs_for_generation(*args, **kwargs)


# trainer: J3
def test_any_module_of_the_right_shape_takes_an_adapter(tiny_model, byte_tokenizer):
    wrapped = attach(Shaped(tiny_model), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), byte_tokenizer)
    check_trainable(wrapped)
    assert len(trained(wrapped)) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trainable_token_indices": [9999]}, "peft_config: "),
        ({"target_modules": "no_such_layer"}, "peft_config: "),
        ({"target_modules": ["embed_tokens"], "trainable_token_indices": [3]}, "peft_config: "),
    ],
)
def test_what_peft_refuses_is_a_config_error(tiny_model, options, words):
    with pytest.raises(ConfigError, match=words):
        attach(tiny_model, LoraConfig(**{**LORA, **options}))


class KeepGradients(TrainerCallback):
    """The gradients of the last step, as the optimizer got them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.gradients = {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def trained_gradients(model, tokenizer, tmp_path, **options):
    """Loss and gradients of a step that `train()` takes: only there checkpointing is switched on."""
    keep = KeepGradients()
    trainer = make_trainer(model, tokenizer, token_rows(), tmp_path, max_steps=1, **options)
    trainer.add_callback(keep)
    loss = trainer.train().training_loss
    assert getattr(trainer.model, "is_gradient_checkpointing", False) is options.get("gradient_checkpointing", False)
    return loss, keep.gradients


# trainer: H6
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_checkpointing_keeps_an_adapters_gradients(tiny_model, byte_tokenizer, tmp_path, kwargs):
    wrapped = attach(tiny_model, LoraConfig(**LORA, init_lora_weights=False))
    expected = trained_gradients(copy.deepcopy(wrapped), byte_tokenizer, tmp_path, gradient_checkpointing=False)
    reentrant = bool(kwargs and kwargs["use_reentrant"])
    assert require_input_grads(wrapped, True, kwargs or {"use_reentrant": False}) is reentrant
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    assert_same(trained_gradients(wrapped, byte_tokenizer, tmp_path, **options), expected)


# ---- kinds of LoRA

KINDS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "r": 4},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "tokens": {"trainable_token_indices": [65, 257]},
    "parameters": {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
    "bias": {"bias": "lora_only"},
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_of_lora_has_the_gradients_of_a_plain_loop(tiny_model, byte_tokenizer, tmp_path, kind):
    torch.manual_seed(0)
    wrapped = attach(tiny_model, LoraConfig(**{**LORA, **KINDS[kind]}))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name and parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 10
    trainer = make_trainer(copy.deepcopy(wrapped), byte_tokenizer, token_rows(), tmp_path)
    assert_same(first_gradients(trainer), reference_gradients(wrapped, token_rows()), tolerance=2e-5)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_an_adapter_that_borrows_from_its_base_changes_nothing_at_first(tiny_model, kind):
    expected = tiny_model(IDS).logits
    wrapped = attach(tiny_model, LoraConfig(**{**LORA, **KINDS[kind]}))
    torch.testing.assert_close(wrapped(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wrapped.merge_and_unload()(IDS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"target_modules": ["q_proj", "lm_head"], "use_rslora": True},  # peft saves the head itself, too
    ],
)
def test_a_borrowing_adapter_is_saved_as_lora_on_the_untouched_base(tiny_model, tmp_path, init, options):
    tiny_model.save_pretrained(tmp_path / "base")
    wrapped = attach(tiny_model, LoraConfig(**{"r": 4, "lora_alpha": 6, **LORA, **options}, init_lora_weights=init))
    for parameter in (p for p in wrapped.parameters() if p.requires_grad):
        parameter.data += torch.randn_like(parameter) / 50
    wrapped.save_pretrained(tmp_path / "adapter")
    assert save_plain_lora(wrapped, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert again.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(again(IDS).logits, wrapped.eval()(IDS).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_a_checkpoint_answers_where_its_start_can_be_found_again(tiny_model, tmp_path, init):
    tiny_model.save_pretrained(tmp_path / "base")
    base = load_model(str(tmp_path / "base"))
    wrapped = attach(base, LoraConfig(**{"r": 4, **LORA}, init_lora_weights=init)).eval()
    wrapped.save_pretrained(tmp_path / "checkpoint-1")
    fresh = load_model(str(tmp_path / "base"))
    if init == "pissa_niter_4":
        with pytest.raises(ModelError, match="an adapter that began with a part of its base"):
            put_on(fresh, tmp_path / "checkpoint-1")
    else:
        again = put_on(fresh, tmp_path / "checkpoint-1").eval()
        torch.testing.assert_close(again(IDS).logits, wrapped(IDS).logits, atol=1e-5, rtol=1e-5)


def test_embeddings_lend_nothing(tiny_model):
    with pytest.raises(ConfigError, match="lora_init: pissa takes a part out of 'embed_tokens'"):
        attach(tiny_model, LoraConfig(**{**LORA, "target_modules": ["embed_tokens"]}, init_lora_weights="pissa"))


def test_an_ordinary_adapter_is_saved_as_it_is(tiny_model, tmp_path):
    wrapped = attach(tiny_model, LoraConfig(**LORA))
    wrapped.save_pretrained(tmp_path)
    assert not save_plain_lora(wrapped, tmp_path)


def test_lora_plus_gives_b_a_rate_of_its_own(tiny_model):
    wrapped = attach(tiny_model, LoraConfig(**LORA, use_dora=True, modules_to_save=["norm"]))
    groups = loraplus_groups(wrapped, 1e-3, 16, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in wrapped.named_parameters()}
    found = {(g["lr"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}
    assert set(found) == {(1e-3, 0.0), (1e-3, 0.1), (1.6e-2, 0.1)}
    assert all("lora_B" in name for name in found[1.6e-2, 0.1])
    assert all("magnitude" in name or "norm" in name for name in found[1e-3, 0.0])
    assert set().union(*found.values()) == trained(wrapped)


def test_lora_plus_decays_what_the_trainer_decays(tiny_model):
    wrapped = attach(tiny_model, LoraConfig(**LORA))
    one = next(name for name in trained(wrapped) if "lora_A" in name)
    groups = loraplus_groups(wrapped, 1.0, 2, weight_decay=0.1, decayed={one})
    assert sorted((g["lr"], g["weight_decay"], len(g["params"])) for g in groups) == [
        (1.0, 0.0, 13),
        (1.0, 0.1, 1),
        (2.0, 0.0, 14),
    ]


def test_lora_plus_without_lora_is_an_error(tiny_model):
    with pytest.raises(ConfigError, match="loraplus_lr_ratio: the model has no LoRA"):
        loraplus_groups(tiny_model, 1e-3, 16)


# ---- the recipe's fields


@pytest.mark.parametrize(("init", "expected"), [("default", True), ("pissa", "pissa"), ("olora", "olora")])
def test_lora_init_acts(tiny_model, init, expected):
    model = adapt(tiny_model, ModelFields(lora_init=init))
    assert model.peft_config["default"].init_lora_weights == expected
    assert hasattr(model, "first_lora_weights") is (init != "default")


def test_lora_trainable_tokens_act(tiny_model, byte_tokenizer):
    model = adapt(tiny_model, ModelFields(lora_trainable_tokens=["<|im_start|>", "<|im_end|>"]), byte_tokenizer)
    assert model.peft_config["default"].trainable_token_indices == {"embed_tokens": [256, 257], "lm_head": [256, 257]}


@pytest.mark.parametrize(
    ("name", "with_tokenizer", "words"),
    [
        ("<|im_stop|>", True, r"no token '<\|im_stop\|>'. Did you mean '<\|im_start\|>'"),
        ("<|im_end|>", False, "a tokenizer is needed"),
    ],
)
def test_a_token_that_does_not_exist(tiny_model, byte_tokenizer, name, with_tokenizer, words):
    with pytest.raises(ConfigError, match=words):
        adapt(tiny_model, ModelFields(lora_trainable_tokens=[name]), byte_tokenizer if with_tokenizer else None)


def test_new_tokens_are_said_and_trained_in_a_recipe_too(tiny_model, byte_tokenizer):
    tiny_model.get_input_embeddings().weight.data[257] = 0
    said = []
    model = adapt(tiny_model, ModelFields(), byte_tokenizer, said.append)
    assert said[0].startswith("tokens: the embedding rows of <|im_end|> were never trained")
    assert model.peft_config["default"].trainable_token_indices == {"embed_tokens": [257], "lm_head": [257]}
