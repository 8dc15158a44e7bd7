"""4- and 8-bit bases on the CPU: they load, keep documents apart, pass exact gradients, and adapters on them learn."""

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests import tiny
from tests.model.test_adapt import trained_gradients
from tests.train.rows import assert_same, first_gradients, make_trainer, token_rows
from tunesmith.config import ModelFields
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model import quantize
from tunesmith.model.adapt import attach, check_trainable, count_parameters, upcast_trainable
from tunesmith.model.capabilities import probe_model
from tunesmith.model.chain import merge_folders
from tunesmith.model.load import check_vocabulary, load_any, load_model
from tunesmith.model.quantize import (
    hold_adapters_in,
    is_quantized,
    keep_differentiable,
    multiply_in,
    own_device,
    prepare_for_kbit_training,
    quantization_options,
    require_input_grads,
    with_quantization_config,
)

bitsandbytes = pytest.importorskip("bitsandbytes")

KINDS = {
    "nf4": {"load_in_4bit": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nested": {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
LORA = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
IDS = torch.arange(20).unsqueeze(0)
each_kind = pytest.mark.parametrize("kind", sorted(KINDS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved Llama wide enough for blocks of 64 values."""
    path = tmp_path_factory.mktemp("base")
    tiny.make_tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return str(path)


def load(folder, kind="nf4", **options):
    return load_model(folder, dtype="float32", **KINDS[kind], **options)


def dense_copy(folder, quantized):
    """The float32 model whose weights are exactly those that `quantized` multiplies with."""
    model, modules = load_model(folder, dtype="float32"), dict(quantized.named_modules())
    for name, layer in model.named_modules():
        weight = modules[name].weight if isinstance(layer, nn.Linear) else None
        if weight.__class__.__name__ == "Params4bit":
            layer.weight.data = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif weight.__class__.__name__ == "Int8Params":
            layer.weight.data = weight.data.float() * weight.SCB.unsqueeze(1) / 127
    return model


def adapter_gradients(model):
    """Gradients of a fixed adapter on `model`, by name."""
    wrapped = attach(model, LoraConfig(**LORA))
    generator = torch.Generator().manual_seed(0)
    for parameter in (p for p in wrapped.parameters() if p.requires_grad):
        parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    wrapped.train()(IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in wrapped.named_parameters() if p.grad is not None}


# ---- loading


# trainer: H5 H8
@each_kind
def test_a_base_loads_in_few_bits(folder, kind):
    model = load(folder, kind)
    held = {parameter.dtype for parameter in model.model.layers.parameters() if parameter.ndim > 1}
    assert held == {torch.int8 if kind == "int8" else torch.uint8}
    assert is_quantized(model)
    assert model.lm_head.weight.dtype == model.model.embed_tokens.weight.dtype == torch.float32
    assert count_parameters(model)[1] == 107_200
    check_vocabulary(model, tiny.make_byte_tokenizer())


def test_four_bits_are_nf4_unless_said_otherwise(folder):
    states = [load(folder, kind).model.layers[0].mlp.up_proj.weight.quant_state for kind in ("nf4", "fp4", "nested")]
    assert [(state.quant_type, state.nested) for state in states] == [("nf4", False), ("fp4", False), ("nf4", True)]


def test_a_config_object_does_the_same(folder):
    model = load_model(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert is_quantized(model)
    assert model.is_loaded_in_8bit


def test_a_plain_model_is_not_quantized(tiny_model):
    assert not is_quantized(tiny_model)
    assert not is_quantized(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit cannot both be true"),
        ({"load_in_4bit": True, "quantization_config": {}}, "load_in_4bit and quantization_config both say"),
        ({"bnb_4bit_quant_type": "nf4"}, "bnb_4bit_quant_type has no effect without load_in_4bit"),
    ],
)
def test_options_that_contradict_each_other(folder, options, words):
    with pytest.raises(ConfigError, match=words):
        load_model(folder, **options)


# reliability: 58
@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"quantization_config": {"load_in_8bit": True}}])
def test_a_missing_bitsandbytes_names_the_extra(folder, options, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"bitsandbytes. Install it: pip install 'tunesmith\[quant\]'"):
        load_model(folder, **options)


def test_options_set_to_false_change_nothing(folder):
    assert not is_quantized(load_model(folder, load_in_4bit=False, load_in_8bit=False, bnb_4bit_quant_type=None))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"load_in_8bit": True}, {"load_in_8bit": True}),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True},
            {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        ),
    ],
)
def test_a_recipes_fields_become_arguments(folder, fields, expected):
    assert quantization_options(ModelFields(**fields)) == expected
    assert is_quantized(load_model(folder, **expected)) is bool(fields)


# workflow: M5
def test_a_recipes_fields_become_a_config_object():
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True}
    found = quantization_options(ModelFields(**options), compute_dtype=torch.bfloat16)
    config = with_quantization_config(found)["quantization_config"]
    assert (config.quantization_method(), config.bnb_4bit_use_double_quant) == ("fp4", True)
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    config = with_quantization_config(quantization_options(ModelFields(load_in_8bit=True)))["quantization_config"]
    assert config.quantization_method() == "llm_int8"


# workflow: M5
def test_a_base_is_whole_on_its_own_gpu_in_training_and_spread_in_answering(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for fields in (ModelFields(load_in_4bit=True), ModelFields(load_in_8bit=True)):
        assert quantization_options(fields).get("device_map") is None
        assert own_device() == {"": 1}  # what `load_model` then takes
        assert quantization_options(fields, training=False)["device_map"] == "auto"
        assert quantization_options(fields, training=False, use_cpu=True)["device_map"] == {"": "cpu"}


# workflow: M5
def test_adapters_are_not_merged_into_few_bits(folder, tmp_path):
    model = attach(load_model(folder), LoraConfig(**LORA))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"adapter cannot be merged into a 4- or 8-bit base.*Let it go on training"):
        merge_folders(load(folder), [str(tmp_path / "adapter")])


def test_a_run_on_the_cpu_holds_its_base_there(folder):
    options = quantization_options(ModelFields(load_in_8bit=True), use_cpu=True)
    assert load_model(folder, **options).device.type == "cpu"


@each_kind
def test_a_folder_with_quantized_weights_loads_as_it_is(folder, tmp_path, kind):
    model = load(folder, kind)
    model.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert is_quantized(again)
    assert torch.equal(again.train()(IDS).logits, model.train()(IDS).logits)
    assert len(adapter_gradients(again)) == 28


# ---- gradients


# trainer: H5
@each_kind
@pytest.mark.parametrize("evaluated", [False, True])
def test_gradients_through_a_base_are_those_of_its_dense_copy(folder, kind, evaluated):
    """Also after an evaluation, where bitsandbytes would leave a CPU's weights in a layout without gradients."""
    model = load(folder, kind)
    expected = adapter_gradients(dense_copy(folder, model))
    if evaluated:
        with torch.no_grad():
            model.eval()(IDS)
    found = adapter_gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


# trainer: H5
@pytest.mark.parametrize("kind", ["nf4", "fp4", "nested"])
def test_a_base_that_somebody_evaluated_is_unpacked(folder, kind):
    options = quantize.with_quantization_config(KINDS[kind])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **options)
    weights = {
        name: layer.weight for name, layer in dense_copy(folder, model).named_modules() if hasattr(layer, "weight")
    }
    with torch.no_grad():
        model.eval()(IDS)
    packed = getattr(model.model.layers[0].mlp.up_proj.weight.quant_state, "packing_format_for_cpu", False)
    assert keep_differentiable(model) == (14 if packed else 0)  # CPUs without AVX-512 BF16 never pack
    for name, layer in dense_copy(folder, model).named_modules():
        if isinstance(layer, nn.Linear):
            torch.testing.assert_close(layer.weight, weights[name], rtol=1 / 256, atol=1e-3)
    expected, found = adapter_gradients(dense_copy(folder, model)), adapter_gradients(model)
    assert all(torch.allclose(found[name], gradient, atol=1e-6) for name, gradient in expected.items())


@each_kind
def test_documents_stay_apart_and_the_head_is_plain(folder, kind):
    assert probe_model(load(folder, kind))[:3] == ("documents", True, "")
    assert probe_model(attach(load(folder, kind), LoraConfig(**LORA))).layout == "documents"


def test_outlier_features_are_no_leak_between_documents(folder):
    """8-bit products treat a feature apart where any token of the batch has an outlier there."""
    model = load(folder, "int8")
    model.model.embed_tokens.weight.data[:, 3] *= 300
    assert probe_model(model).layout == "documents"
    assert {layer.state.threshold for layer in model.modules() if hasattr(layer, "state")} == {6.0}


# ---- training


# trainer: H5
@each_kind
@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 32}])
def test_adapters_on_a_quantized_base_learn(folder, byte_tokenizer, tmp_path, kind, options):
    model = load(folder, kind)
    codes = [p.clone() for p in model.model.layers.parameters() if not p.is_floating_point()]
    trainer = make_trainer(
        model,
        byte_tokenizer,
        token_rows(),
        tmp_path,
        peft_config=LoraConfig(**LORA, bias="none"),
        max_steps=12,
        **options,
    )
    losses = [trainer.evaluate(trainer.train_dataset)["eval_loss"]]
    trainer.train()
    losses.append(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    assert losses[1] < losses[0] - 0.3
    assert isinstance(trainer.model, PeftModel)
    after = [p for p in model.model.layers.parameters() if not p.is_floating_point()]
    assert len(after) == 14
    assert all(torch.equal(old, new) for old, new in zip(codes, after))


# trainer: K3 H5 H8
@pytest.mark.parametrize("name", ["load_in_8bit", "load_in_4bit"])
def test_a_trainer_loads_a_base_in_few_bits_by_its_name(folder, byte_tokenizer, tmp_path, name):
    options = {"model_init_kwargs": {name: True, "attn_implementation": "sdpa"}, "max_steps": 1}
    config = LoraConfig(**LORA, bias="none")
    trainer = make_trainer(folder, byte_tokenizer, token_rows(), tmp_path, peft_config=config, **options)
    trainer.train()
    assert is_quantized(trainer.model)
    assert trainer.support.layout == "documents"


# trainer: H5 H6
@each_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_leaves_gradients_as_they_are(folder, byte_tokenizer, tmp_path, kind, reentrant):
    found = []
    for options in (
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        model = prepare_for_kbit_training(load(folder, kind), **options)
        torch.manual_seed(0)
        wrapped = attach(model, LoraConfig(**LORA, init_lora_weights=False))
        found.append(trained_gradients(wrapped, byte_tokenizer, tmp_path, **options))
    assert_same(*found)


def test_a_base_alone_cannot_be_trained(folder):
    with pytest.raises(ModelError, match=r"4- or 8-bit model has no weights .*peft_config=LoraConfig"):
        check_trainable(load(folder))
    check_trainable(attach(load(folder), LoraConfig(**LORA)))


# trainer: K2
def test_preparing_freezes_and_keeps_types(folder):
    model = load_model(folder, dtype="bfloat16", load_in_8bit=True).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    prepare_for_kbit_training(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == torch.bfloat16


# trainer: K2
def test_preparing_with_pefts_own_arguments_is_pefts(folder):
    model = load_model(folder, dtype="bfloat16", load_in_8bit=True)
    prepare_for_kbit_training(model, use_gradient_checkpointing=False)
    assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == torch.float32


# trainer: H5
def test_sharded_bases_are_left_alone(folder):
    model = load(folder)
    model.lm_head.requires_grad_(True)
    assert prepare_for_kbit_training(model, sharded=True).lm_head.weight.requires_grad


def test_preparing_again_leaves_an_adapter_trainable(folder):
    wrapped = attach(load(folder), LoraConfig(**LORA))
    trained = count_parameters(wrapped)[0]
    assert count_parameters(prepare_for_kbit_training(wrapped))[0] == trained > 0


# trainer: H5
def test_adapters_are_held_in_float32_or_as_the_paper_has_them(folder):
    wrapped = attach(load_model(folder, dtype="bfloat16", load_in_4bit=True), LoraConfig(**LORA, use_dora=True))
    upcast_trainable(wrapped)
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    hold_adapters_in(wrapped, torch.bfloat16)
    types = {("magnitude" in name, p.dtype) for name, p in wrapped.named_parameters() if p.requires_grad}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}


# trainer: H5
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weights_that_dora_reads_keep_their_scales(folder, kind):
    wrapped = attach(load(folder, kind), LoraConfig(**LORA, use_dora=True)).eval()
    with torch.no_grad():
        first, *more = (wrapped(IDS).logits for _ in range(3))
        expected = load(folder, kind).eval()(IDS).logits
    assert all(torch.equal(first, logits) for logits in more)
    torch.testing.assert_close(first, expected, atol=2e-2 if kind == "int8" else 1e-4, rtol=0)


# trainer: H5
@pytest.mark.parametrize(("own", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_queries_stay_in_half_precision_unlike_after_pefts_preparation(folder, own, expected):
    """Float32 queries would miss the flash kernel of a GPU."""
    model, seen = load_model(folder, dtype="bfloat16", load_in_4bit=True), []
    prepare_for_kbit_training(model, **({} if own else {"use_gradient_checkpointing": False}))
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS)
    assert seen == [expected]


# trainer: H5
def test_four_bit_layers_multiply_in_the_precision_of_the_run(folder):
    model, seen = load(folder), []
    before = model(IDS).logits
    assert multiply_in(model, torch.bfloat16) == multiply_in(model, torch.bfloat16) == 14
    layer = model.model.layers[0].mlp.up_proj
    assert len(layer._forward_pre_hooks) == 1
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        after = model(IDS).logits
    assert 0 < (after - before).abs().max() < 0.05 * before.abs().max()
    assert model(IDS).logits.dtype == torch.float32  # as `generate` runs it, outside of autocast
    assert seen == [torch.bfloat16, torch.float32]


def inputs_alive_after_a_forward_pass(model, use_reentrant: bool) -> int:
    """How many of the inputs of `down_proj`, one a layer, checkpointing of this kind holds."""
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    require_input_grads(model, True, {"use_reentrant": use_reentrant})
    seen = []
    for name, layer in model.named_modules():
        if name.endswith("down_proj.base_layer"):
            layer.register_forward_hook(lambda module, inputs, output: seen.append(weakref.ref(inputs[0])))
    output = model.train()(IDS, use_cache=False)
    gc.collect()
    assert output.logits.requires_grad
    assert len(seen) == 2
    return sum(reference() is not None for reference in seen)


@pytest.mark.parametrize(("kind", "reentrant"), [("int8", True), ("nf4", False)])
def test_checkpointing_holds_no_inputs_of_layers(folder, byte_tokenizer, tmp_path, kind, reentrant):
    """bitsandbytes keeps inputs of 8-bit layers where only the reentrant kind lets go of them."""
    rows, found = token_rows((12, 16)), []
    for checkpointing in (True, False):
        model = attach(load(folder, kind), LoraConfig(**LORA, init_lora_weights=False))
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
        trainer = make_trainer(model, byte_tokenizer, rows, tmp_path, gradient_checkpointing=checkpointing)
        if checkpointing:
            assert trainer.args.gradient_checkpointing_kwargs == {"use_reentrant": reentrant}
        found.append(first_gradients(trainer))
    assert_same(*found)
    assert inputs_alive_after_a_forward_pass(attach(load(folder, kind), LoraConfig(**LORA)), reentrant) == 0


# ---- afterwards


@each_kind
def test_an_adapter_goes_on_over_a_quantized_base(folder, tmp_path, kind):
    wrapped = attach(load(folder, kind), LoraConfig(**LORA, init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    again = load_any(str(tmp_path), trainable_adapter=True, dtype="float32", **KINDS[kind])
    assert torch.equal(again.eval()(IDS).logits, wrapped.eval()(IDS).logits)
    assert count_parameters(again) == count_parameters(wrapped)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_merging_into_a_quantized_base_rounds(folder, kind):
    """peft can merge into 4 and 8 bits, at the price of rounding again; `tunesmith merge` uses the full base."""
    torch.manual_seed(0)
    wrapped = get_peft_model(load(folder, kind), LoraConfig(**LORA, init_lora_weights=False)).eval()
    expected = wrapped(IDS).logits
    merged = copy.deepcopy(wrapped).merge_and_unload()
    assert 1e-4 < (merged(IDS).logits - expected).abs().max() / expected.abs().max() < 0.5
