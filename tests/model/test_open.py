"""A recipe's model, opened to train and to answer: which weights, which adapters, which types."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.model.folders import for_answers, for_training, logits, save_adapter, save_base, trained
from tests.train.rows import make_trainer, token_rows
from tunesmith.config import ModelFields
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model import open as opening
from tunesmith.model.adapt import count_parameters, trainable_line
from tunesmith.model.open import answer_dtype, hub_options, open_tokenizer, start_of
from tunesmith.model.quantize import is_quantized

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def base(tmp_path, tiny_model, byte_tokenizer):
    return save_base(tmp_path / "base", tiny_model, byte_tokenizer)


@pytest.fixture
def adapters(tmp_path, base):
    """Two adapters of the base."""
    return [save_adapter(tmp_path / name, base, seed) for seed, name in enumerate("ab", 1)]


def whole(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def with_adapters(base, *folders):
    """The reference: peft applies one, merges it, applies the next."""
    model = whole(base)
    for folder in folders[:-1]:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return PeftModel.from_pretrained(model, folders[-1])


# ---- adapters


# workflow: M8
def test_an_adapter_goes_on_from_the_very_weights_that_were_saved(base, adapters):
    model = for_training(model_name_or_path=base, checkpoint_dir=adapters[0])
    assert torch.equal(logits(model), logits(with_adapters(base, adapters[0])))
    assert trained(model)
    assert all("lora_" in name for name in trained(model))


# workflow: M8
def test_a_chain_of_two_is_both_and_the_last_goes_on(base, adapters):
    said = []
    model = for_training(said.append, model_name_or_path=base, checkpoint_dir=", ".join(adapters))
    assert torch.allclose(logits(model), logits(with_adapters(base, *adapters)), atol=1e-5)
    assert list(model.peft_config) == ["default"]
    assert said == [
        f"adapter: {adapters[0]} is merged into the base",
        f"adapter: {adapters[1]} goes on training (r 4)",
    ]


# workflow: M8
def test_a_new_adapter_begins_at_nothing_on_top_of_all_the_others(base, adapters):
    options = {"model_name_or_path": base, "checkpoint_dir": adapters, "resume_lora_training": False, "lora_r": 2}
    model = for_training(**options)
    expected = with_adapters(base, *adapters).merge_and_unload()
    assert torch.allclose(logits(model), logits(expected), atol=1e-5)
    with model.disable_adapter():
        assert torch.allclose(logits(model), logits(expected), atol=1e-5)
    assert model.peft_config["default"].r == 2


# workflow: M8
def test_all_adapters_answer(base, adapters):
    model = for_answers(model_name_or_path=base, checkpoint_dir=adapters)
    assert torch.allclose(logits(model), logits(with_adapters(base, *adapters)), atol=1e-5)
    assert not trained(model)


# workflow: M8
def test_a_half_precision_base_is_summed_in_float32_and_rounded_once(base, adapters):
    model = for_answers(model_name_or_path=base, checkpoint_dir=adapters, dtype="bfloat16").get_base_model()
    exact = PeftModel.from_pretrained(whole(base).bfloat16().float(), adapters[0]).merge_and_unload().bfloat16()
    found = model.model.layers[0].mlp.up_proj.base_layer.weight
    assert torch.equal(found, exact.model.layers[0].mlp.up_proj.weight)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32  # a cast of the whole model would round it


def test_an_adapter_folder_as_the_model_goes_on_too(base, adapters):
    model = for_training(model_name_or_path=adapters[0])
    assert torch.equal(logits(model), logits(with_adapters(base, adapters[0])))
    with pytest.raises(ConfigError, match="is a LoRA adapter, which only goes on as lora"):
        for_training(model_name_or_path=adapters[0], adapter="full")
    with pytest.raises(ConfigError, match="is an adapter already, and checkpoint_dir names others"):
        for_training(model_name_or_path=adapters[0], checkpoint_dir=adapters[1])


def test_without_its_adapter_a_base_answers_as_it_is(base, adapters):
    said = []
    model = for_answers(said.append, model_name_or_path=adapters[0], adapter="none")
    assert torch.equal(logits(model), logits(whole(base)))
    assert said == [f"adapter: none, so that of {adapters[0]} is left out and its base answers"]


# workflow: M5 M8
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_quantized_base_takes_one_adapter_which_goes_on(base, adapters, bits):
    with pytest.raises(ConfigError, match=r"merged into a 4- or 8-bit base, which cannot hold the sum. Name one"):
        start_of(ModelFields(base, checkpoint_dir=adapters, **{bits: True}), training=True, say=print)
    said = []
    options = ModelFields(base, checkpoint_dir=adapters[0], resume_lora_training=False, **{bits: True})
    assert start_of(options, training=True, say=said.append).adapter == adapters[0]
    assert "goes on all the same" in said[0]


# workflow: M5
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_an_adapter_learns_on_a_quantized_base(tmp_path, make_tiny_model, byte_tokenizer, bits):
    pytest.importorskip("bitsandbytes")
    wide = make_tiny_model(hidden_size=64, intermediate_size=128)  # blocks hold 64 values
    folder = save_base(tmp_path / "wide", wide, byte_tokenizer)
    model = for_training(model_name_or_path=folder, **{bits: True})
    assert is_quantized(model)
    trainer = make_trainer(model, byte_tokenizer, token_rows(), tmp_path / "run", max_steps=8, logging_steps=1)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    trainer.save_model()
    answering = for_answers(model_name_or_path=str(tmp_path / "run"), **{bits: True})
    assert torch.allclose(logits(answering), logits(model), atol=1e-4)


# ---- what does not fit


def test_an_adapter_of_a_wider_base_is_refused(base, tmp_path, make_tiny_model, byte_tokenizer):
    other = save_base(tmp_path / "other", make_tiny_model(hidden_size=64), byte_tokenizer)
    adapter = save_adapter(tmp_path / "wide", other)
    with pytest.raises(ModelError, match=r"wide does not fit .*base \(it was trained on .*other\): .*size mismatch"):
        for_training(model_name_or_path=base, checkpoint_dir=adapter)


def test_an_adapter_of_a_deeper_base_is_refused(base, tmp_path, make_tiny_model, byte_tokenizer):
    """peft loads it without a word, and leaves out the layers that are not there."""
    other = save_base(tmp_path / "other", make_tiny_model(num_hidden_layers=3), byte_tokenizer)
    adapter = save_adapter(tmp_path / "deep", other)
    with pytest.raises(
        ModelError, match=r"deep does not fit .*layers\.2\..*, the base has no such layer \(14 weights"
    ):
        for_answers(model_name_or_path=base, checkpoint_dir=adapter)


# workflow: M3
# reliability: 59
def test_folders_that_hold_something_else(base, adapters, tmp_path):
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"")
    for error, words, options in [
        (ModelError, "there is no folder nowhere", {"checkpoint_dir": "nowhere"}),
        (ModelError, "is no adapter, .* It is a whole model", {"checkpoint_dir": base}),
        (ModelError, "pickled", {"checkpoint_dir": str(tmp_path / "pickled")}),
        (
            ConfigError,
            "begins with one folder of whole weights, got 2",
            {"adapter": "full", "checkpoint_dir": [base] * 2},
        ),
        (ConfigError, "is a LoRA adapter, and adapter freeze", {"adapter": "freeze", "checkpoint_dir": adapters[:1]}),
        (ConfigError, "no effect with adapter: none", {"adapter": "none", "checkpoint_dir": adapters}),
        (ConfigError, "model_name_or_path is missing", {"model_name_or_path": None}),
    ]:
        with pytest.raises(error, match=words):
            for_answers(**{"model_name_or_path": base, **options})


def test_an_adapter_on_an_adapter_names_the_way_out(adapters, tmp_path):
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": adapters[0]}))
    with pytest.raises(ConfigError, match=r"b names .*a as its base, which is an adapter too. Merge that one first"):
        for_answers(model_name_or_path=adapters[1])


# reliability: 59
def test_a_tokenizer_with_more_tokens_than_embeddings(base, make_tiny_model, byte_tokenizer, tmp_path):
    small = save_base(tmp_path / "small", make_tiny_model(vocab_size=258, pad_token_id=0), byte_tokenizer)
    with pytest.raises(ModelError, match="the tokenizer has 259 tokens but the model only 258 embeddings"):
        for_training(model_name_or_path=small, tokenizer=byte_tokenizer)


# ---- whole weights


# workflow: M3 M7
@pytest.mark.parametrize("adapter", ["full", "freeze"])
def test_whole_weights_come_from_the_checkpoint(base, tmp_path, make_tiny_model, byte_tokenizer, adapter):
    other = make_tiny_model().bfloat16()
    other.lm_head.weight.data += 1
    saved = save_base(tmp_path / "saved", other, byte_tokenizer, torch.bfloat16)
    model = for_training(model_name_or_path=base, adapter=adapter, checkpoint_dir=saved)
    assert torch.equal(logits(model), logits(whole(saved)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    answering = for_answers(model_name_or_path=base, adapter=adapter, checkpoint_dir=saved)
    assert torch.equal(logits(answering), logits(whole(saved)))


# workflow: M7
def test_an_adapter_that_is_none_trains_nothing(base):
    with pytest.raises(ConfigError, match=r"adapter: none trains nothing\. Set lora, full or freeze"):
        for_training(model_name_or_path=base, adapter="none")


# ---- answering


# workflow: M1
def test_a_base_without_adapter_answers_as_it_is_and_says_so(base):
    said = []
    assert torch.equal(logits(for_answers(said.append, model_name_or_path=base)), logits(whole(base)))
    assert said == [f"adapter: none is given, so {base} answers as it is"]


# workflow: M10
def test_a_model_that_answers_has_no_gradients(base, adapters):
    for options in ({}, {"checkpoint_dir": adapters[0]}, {"adapter": "full"}):
        model = for_answers(model_name_or_path=base, **options)
        assert not model.training
        assert not trained(model)


# workflow: M10
@pytest.mark.parametrize(
    ("asked", "stored", "native", "expected"),
    [
        ("auto", torch.float32, True, torch.bfloat16),
        ("auto", None, True, torch.bfloat16),
        ("auto", torch.float16, True, "auto"),
        ("auto", torch.bfloat16, True, "auto"),
        ("auto", torch.bfloat16, False, torch.float16),
        ("float32", torch.bfloat16, True, "float32"),
    ],
)
def test_gpus_answer_in_half_precision(monkeypatch, asked, stored, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert answer_dtype(asked, stored, on_gpu=True) == expected
    assert answer_dtype("auto", stored, on_gpu=False) == "float32"


# workflow: M10
def test_modules_that_an_adapter_brings_whole_have_the_bases_type(base, tmp_path):
    adapter = save_adapter(tmp_path / "whole", base, modules_to_save=["embed_tokens", "lm_head"])
    model = for_answers(model_name_or_path=base, checkpoint_dir=adapter, dtype="bfloat16")
    assert model(torch.arange(4)[None]).logits.dtype == torch.bfloat16


# ---- figures and options


# workflow: M11
def test_the_line_on_what_trains_has_exact_numbers(base):
    model = for_training(model_name_or_path=base, lora_r=2, lora_target_modules=["q_proj"])
    # two layers, A (2, 32) and B (32, 2) in each
    assert trainable_line(model) == "trainable params: 256 || all params: 29,280 || trainable%: 0.8743"


# workflow: M11
def test_weights_that_are_elsewhere_are_counted(tiny_model):
    for parameter in tiny_model.parameters():  # what DeepSpeed's ZeRO-3 leaves on each process
        parameter.ds_numel, parameter.data = parameter.numel(), torch.empty(0)
    assert count_parameters(tiny_model) == (29_024, 29_024)


# workflow: M2
def test_what_the_hub_is_told(base, monkeypatch):
    seen = []
    options = ModelFields(base, cache_dir="cache", hf_token="hf_abc", model_revision="v1", use_fast_tokenizer=False)
    expected = {"revision": "v1", "trust_remote_code": False, "cache_dir": "cache", "token": "hf_abc"}
    assert hub_options(options) == expected
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(opening, name, lambda *args, **given: seen.append(given) or 1 / 0)
    said = []
    with pytest.raises(ZeroDivisionError):
        open_tokenizer(options, say=said.append)
    with pytest.raises(ZeroDivisionError):
        opening.open_for_training(options, None, seed=0, max_length=None, use_cpu=True, say=said.append)
    assert all(given.items() >= expected.items() for given in seen)
    assert len(seen) == 2
    assert said == [
        "use_fast_tokenizer: transformers 5 has no other tokenizers where a fast one exists; that one is taken"
    ]


# workflow: M2
def test_the_tokenizer_is_that_of_the_last_training(base, adapters, byte_tokenizer, tmp_path):
    byte_tokenizer.save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "chat_template.jinja").write_text("{{ 'trained' }}")
    assert open_tokenizer(ModelFields(base, checkpoint_dir=adapters)).chat_template == "{{ 'trained' }}"
    assert open_tokenizer(ModelFields(base, checkpoint_dir=adapters[0])).chat_template == byte_tokenizer.chat_template
