"""Chat formats given to base models, and embedding rows that no training touched."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig

from tests import tiny
from tests.train.rows import first_gradients, make_trainer, reference_gradients
from tunesmith.errors import ConfigError
from tunesmith.model.adapt import attach, train_new_tokens
from tunesmith.model.chat_format import (
    CHAT_FORMATS,
    clone_chat_template,
    release_padding_row,
    setup_chat_format,
    untrained_tokens,
)
from tunesmith.model.load import load_any

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


@pytest.fixture
def base():
    """A model and a tokenizer that know no chat: 261 tokens of a Llama-like family, no template."""
    tokenizer = tiny.make_byte_tokenizer("llama3")
    tokenizer.chat_template = None
    return tiny.make_tiny_model(vocab_size=len(tokenizer)), tokenizer


# trainer: E1
def test_a_chat_format_adds_tokens_template_and_rows(base):
    model, tokenizer = setup_chat_format(*base)
    assert (model, tokenizer) == base
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert {start, end} == {261, 262}
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == 263
    assert model(torch.tensor([[start, 72, end]])).logits.shape == (1, 3, 263)
    assert tokenizer("<|im_end|>")["input_ids"] == [end]


# trainer: E1
def test_model_generation_and_tokenizer_agree_on_where_a_text_ends(base):
    model, tokenizer = setup_chat_format(*base)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (261, 262, 262)


# trainer: E1
def test_chatml_renders_turns_and_the_beginning_of_an_answer(base):
    _, tokenizer = setup_chat_format(*base)
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == text
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


# trainer: E1
@pytest.mark.parametrize("multiple", [64, 100])
def test_rows_are_rounded_up_to_a_multiple(base, multiple):
    model, tokenizer = setup_chat_format(*base, resize_to_multiple_of=multiple)
    assert model.vocab_size == model.get_input_embeddings().weight.shape[0] == -(-263 // multiple) * multiple
    assert len(tokenizer) == 263


# trainer: E1
def test_a_template_that_is_there_is_not_replaced(base):
    base[1].chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match="Chat template is already added to the tokenizer"):
        setup_chat_format(*base)


# trainer: E1
def test_an_unknown_format_is_named(base):
    with pytest.raises(
        ValueError, match=r"Format chatlm not available. Did you mean 'chatml'\? Please use one of chatml"
    ):
        setup_chat_format(*base, format="chatlm")
    assert "chatml" in CHAT_FORMATS


def test_new_rows_begin_at_the_mean_of_the_others(base):
    before = base[0].get_input_embeddings().weight.detach().clone()
    model, _ = setup_chat_format(*base)
    after = model.get_input_embeddings().weight.detach()
    assert torch.equal(after[:261], before)
    torch.testing.assert_close(after[261:], before.mean(0).expand(2, -1), atol=1e-5, rtol=0)


def test_rows_beyond_the_tokenizer_are_used_and_kept():
    tokenizer = tiny.make_byte_tokenizer("llama3")
    tokenizer.chat_template = None
    model = tiny.make_tiny_model(vocab_size=300)
    before = model.lm_head.weight.detach().clone()
    setup_chat_format(model, tokenizer)
    assert model.lm_head.weight.shape[0] == 300
    torch.testing.assert_close(model.lm_head.weight[261:263], before[:261].mean(0).expand(2, -1))
    assert torch.equal(model.lm_head.weight[263:], before[263:])


def test_tokens_that_are_there_keep_their_rows(byte_tokenizer):
    tokenizer, model = copy.deepcopy(byte_tokenizer), tiny.make_tiny_model()
    tokenizer.chat_template, before = None, model.lm_head.weight.detach().clone()
    setup_chat_format(model, tokenizer)
    assert torch.equal(model.lm_head.weight, before)
    assert len(tokenizer) == 259


# trainer: E2
# reliability: 45
@pytest.mark.parametrize("padding_free", [None, False])
def test_the_stop_token_is_trained_though_it_is_the_padding(base, tmp_path, padding_free):
    """Contradiction 11: the page forbids pad == eos and its own function sets it; here that hides nothing."""
    model, tokenizer = setup_chat_format(*base)
    chats = [{"messages": CHAT}, {"messages": [*CHAT, CHAT[0], {"role": "assistant", "content": "Yo, yo, yo!"}]}]
    trainer = make_trainer(model, tokenizer, chats, tmp_path, padding_free=padding_free)
    batch = next(iter(trainer.get_train_dataloader()))
    stop = tokenizer.eos_token_id
    assert stop == tokenizer.pad_token_id
    assert (batch["loss_targets"] == stop).sum() == 3  # one for each answer, none for padding
    assert len(batch["loss_targets"]) == 3 + 3 + 12


# trainer: E2
def test_the_stop_tokens_row_gets_its_gradient_though_it_is_the_padding(base):
    model, tokenizer = setup_chat_format(*base)
    model.model.embed_tokens.padding_idx = tokenizer.eos_token_id  # as a model built from the saved config has it
    ids = torch.tensor([[72, tokenizer.eos_token_id, 73, 74]])
    assert release_padding_row(model)
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad[tokenizer.eos_token_id].abs().sum() > 0


def test_a_row_for_padding_alone_stays_as_it_is(tiny_model):
    assert not release_padding_row(tiny_model)
    assert tiny_model.model.embed_tokens.padding_idx == 258


# ---- another tokenizer's template


@pytest.fixture
def source(tmp_path):
    """A tokenizer with ChatML and two tokens of its own for tools."""
    tokenizer = tiny.make_byte_tokenizer()
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save_pretrained(tmp_path / "source")
    return str(tmp_path / "source")


# trainer: E1
def test_a_template_is_cloned_with_its_tokens(base, source):
    model, tokenizer, added = clone_chat_template(*base, source)
    names = ["<|im_start|>", "<|im_end|>", "<tool>", "</tool>"]
    assert tokenizer.convert_ids_to_tokens(added[:4]) == names
    assert tokenizer.convert_ids_to_tokens(added[4:]) == [f"<extra_id_{number}>" for number in range(320 - 265)]
    assert model.vocab_size == len(tokenizer.get_vocab()) == 320
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.apply_chat_template(CHAT, tokenize=False).endswith("Yo<|im_end|>\n")


def test_a_cloned_vocabulary_is_rounded_only_when_asked(base, source):
    model, _, added = clone_chat_template(*base, source, resize_to_multiple_of=None)
    assert (model.vocab_size, len(added)) == (265, 4)


def test_a_source_without_template(base, tmp_path):
    base[1].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no chat template"):
        clone_chat_template(*base, str(tmp_path))


# ---- rows that no training touched

LORA = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


# trainer: H3
def test_trained_rows_are_left_alone(tiny_model, byte_tokenizer):
    config = LoraConfig(**LORA)
    assert untrained_tokens(tiny_model, byte_tokenizer) == {}
    assert train_new_tokens(tiny_model, byte_tokenizer, config) == []
    assert config.trainable_token_indices is None


# trainer: H3
@pytest.mark.parametrize("fill", ["mean", "zero", "twin"])
def test_rows_that_were_never_trained_are_found(tiny_model, byte_tokenizer, fill):
    weight = tiny_model.get_input_embeddings().weight.data
    weight[257] = {"mean": weight.mean(0), "zero": torch.zeros(32), "twin": weight[258] + 1e-6}[fill]
    assert untrained_tokens(tiny_model, byte_tokenizer) == {"<|im_end|>": 257}


# trainer: H3
@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_train_beside_the_adapter_and_other_rows_do_not(tmp_path, tied):
    tokenizer = tiny.make_byte_tokenizer("llama3")
    tokenizer.chat_template = None
    model = tiny.make_tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=tied)
    setup_chat_format(model, tokenizer)
    said, config = [], LoraConfig(**LORA)
    wrapped = attach(model, config, tokenizer, said.append)
    layers = "embed_tokens" if tied else "embed_tokens and lm_head"
    assert said[0].startswith("tokens: the embedding rows of <|im_start|>, <|im_end|> were never trained")
    assert said[0].endswith(f"({layers})")
    assert config.trainable_token_indices is None  # the caller's
    before = [layer.weight.detach().clone() for layer in merged_layers(wrapped)]
    trainer = make_trainer(wrapped, tokenizer, [{"messages": CHAT}], tmp_path, max_steps=1)
    trainer.train()
    for old, layer in zip(before, merged_layers(wrapped)):
        changed = (old != layer.weight).any(1).nonzero().flatten().tolist()
        assert changed == [261, 262]


def merged_layers(wrapped):
    """Embeddings and head with their trained rows put in."""
    merged = copy.deepcopy(wrapped).merge_and_unload()
    return [merged.get_input_embeddings(), merged.get_output_embeddings()]


# trainer: H3
@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_new_rows_is_that_of_a_plain_loop(base, tmp_path, tied):
    tokenizer = base[1]
    model = tiny.make_tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=tied)
    setup_chat_format(model, tokenizer)
    wrapped = attach(model, LoraConfig(**LORA, init_lora_weights=False), tokenizer, lambda line: None)
    trainer = make_trainer(copy.deepcopy(wrapped), tokenizer, [{"messages": CHAT}] * 2, tmp_path)
    expected = reference_gradients(wrapped, trainer.train_dataset)
    found = first_gradients(trainer)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


# trainer: H3
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
)
def test_nothing_is_added_where_the_embeddings_train_already(base, options):
    model, tokenizer = setup_chat_format(*base)
    config = LoraConfig(**{**LORA, **options})
    assert train_new_tokens(model, tokenizer, config) == []
    assert config.trainable_token_indices is None


def test_only_what_stays_frozen_is_added(base):
    model, tokenizer = setup_chat_format(*base)
    config = LoraConfig(**LORA, modules_to_save=["lm_head"], trainable_token_indices=[7])
    train_new_tokens(model, tokenizer, config)
    assert config.trainable_token_indices == {"embed_tokens": [7, 261, 262]}


# trainer: H3
def test_adapters_that_cannot_train_rows_warn(base):
    model, tokenizer = setup_chat_format(*base)
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match=r"<\|im_end\|> were never trained.* IA3Config cannot train single rows"):
        attach(model, config, tokenizer)


# trainer: E1 H3
def test_an_adapter_with_new_tokens_loads_on_the_base_as_it_was(base, tmp_path):
    tokenizer = base[1]
    base[0].save_pretrained(tmp_path / "base")
    model = load_any(str(tmp_path / "base"))
    setup_chat_format(model, tokenizer, resize_to_multiple_of=64)
    wrapped = attach(model, LoraConfig(**LORA, init_lora_weights=False), tokenizer, lambda line: None)
    torch.nn.init.normal_(wrapped.get_input_embeddings().token_adapter.trainable_tokens_delta["default"])
    wrapped.save_pretrained(tmp_path / "adapter")
    again = load_any(str(tmp_path / "adapter"))
    ids = torch.tensor([[261, 72, 262]])
    assert torch.equal(again.eval()(ids).logits[..., :263], wrapped.eval()(ids).logits[..., :263])
