"""Batched generation answers as one-by-one generation does, and leaves model and tokenizer as they were."""

import copy
import logging
import warnings

import pytest
import torch
from transformers import GenerationConfig

from tunesmith.config import DecodingConfig
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluate.generate import (
    answering,
    decode_answer,
    encode_prompt,
    generate_batch,
    generate_texts,
    generation_config,
    stop_token_ids,
    template_stop_id,
)

PROMPTS = ["hello", "a much longer prompt than the others", "x", "two words", "ünïcödé 🙂", "yes?"]
IDS = [list(prompt.encode()) for prompt in PROMPTS]  # of the byte tokenizer
SHORT = {"max_new_tokens": 12}


@pytest.fixture
def byte_tokenizer(byte_tokenizer):
    """A copy, because tests here change it."""
    return copy.deepcopy(byte_tokenizer)


def greedy_by_hand(model, ids, count, stops):
    """One forward pass per token over the whole text, no cache and no padding."""
    ids, new = list(ids), []
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids, new = [*ids, token], [*new, token]
        if token in stops:
            break
    return new


@pytest.mark.parametrize("batch_size", [1, 2, 6, 8])
def test_answers_equal_greedy_search_by_hand_whatever_the_batch(tiny_model, byte_tokenizer, batch_size):
    stops = stop_token_ids(tiny_model, byte_tokenizer)
    tiny_model.eval()
    expected = {}
    for index, prompt in enumerate(IDS):
        new = greedy_by_hand(tiny_model, prompt, 12, stops)
        expected[index] = decode_answer(byte_tokenizer, new, stops)
    decoding = SHORT | {"generation_batch_size": batch_size}
    assert dict(generate_texts(tiny_model, byte_tokenizer, IDS, decoding=decoding)) == expected


def test_padding_with_the_stop_token_does_no_harm(tiny_model, byte_tokenizer):
    alone = dict(generate_texts(tiny_model, byte_tokenizer, IDS, decoding=SHORT))
    byte_tokenizer.pad_token = byte_tokenizer.eos_token
    assert dict(generate_texts(tiny_model, byte_tokenizer, IDS, decoding=SHORT)) == alone
    byte_tokenizer.pad_token = None
    assert dict(generate_texts(tiny_model, byte_tokenizer, IDS, decoding=SHORT)) == alone


def test_generation_ends_at_every_stop_token_and_leaves_it_out(tiny_model, byte_tokenizer):
    prompt = byte_tokenizer("hello")["input_ids"]
    free = greedy_by_hand(tiny_model.eval(), prompt, 12, stops=[])
    stop = next(token for token in free[2:] if token not in free[:2])
    end = byte_tokenizer.eos_token_id
    config = generation_config(SHORT, [end, stop], pad_id=byte_tokenizer.pad_token_id)
    new = generate_batch(tiny_model, [prompt], config)[0]
    assert new == free[: free.index(stop) + 1]
    assert decode_answer(byte_tokenizer, new, [end, stop]) == byte_tokenizer.decode(free[: free.index(stop)])


def test_model_and_tokenizer_are_left_as_they_were(tiny_model, byte_tokenizer):
    tiny_model.train()
    tiny_model.model.layers[0].eval()
    tiny_model.config.use_cache = False
    modes = [module.training for module in tiny_model.modules()]
    config, own = copy.deepcopy(tiny_model.config), tiny_model.generation_config.to_dict()
    byte_tokenizer.padding_side = "right"
    list(generate_texts(tiny_model, byte_tokenizer, IDS, decoding=SHORT))
    assert [module.training for module in tiny_model.modules()] == modes
    assert tiny_model.config.to_dict() == config.to_dict()
    assert tiny_model.generation_config.to_dict() == own
    assert byte_tokenizer.padding_side == "right"
    tiny_model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


def test_training_mode_comes_back_after_an_error(tiny_model):
    tiny_model.train()
    own = tiny_model.generation_config
    answer = answering(tiny_model)
    answer.__enter__()
    assert not tiny_model.training
    assert answer.__exit__(RuntimeError, RuntimeError("out of memory"), None) is not True
    assert tiny_model.training
    assert tiny_model.generation_config is own


def test_greedy_search_is_not_touched_by_the_models_sampling_habits(tiny_model, byte_tokenizer, caplog):
    expected = dict(generate_texts(tiny_model, byte_tokenizer, IDS, decoding=SHORT))
    tiny_model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.5, max_length=40
    )
    logging.getLogger("transformers").propagate = True
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        answers = dict(generate_texts(tiny_model, byte_tokenizer, IDS, decoding=SHORT))
    assert answers == expected
    assert caplog.text == ""


def test_sampling_follows_the_seed_and_differs_from_greedy_search(tiny_model, byte_tokenizer):
    decoding = DecodingConfig(max_new_tokens=12, do_sample=True, temperature=2.0, top_p=0.9)
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(dict(generate_texts(tiny_model, byte_tokenizer, IDS, decoding=decoding)))
    assert answers[0] == answers[1] != answers[2]


def test_beams_are_used(tiny_model, byte_tokenizer):
    greedy = dict(generate_texts(tiny_model, byte_tokenizer, IDS, decoding=SHORT))
    assert dict(generate_texts(tiny_model, byte_tokenizer, IDS, decoding=SHORT | {"num_beams": 4})) != greedy


def test_progress_counts_to_the_end(tiny_model, byte_tokenizer):
    seen = []
    decoding = {"max_new_tokens": 1, "generation_batch_size": 4}
    list(generate_texts(tiny_model, byte_tokenizer, IDS, decoding=decoding, progress=lambda *n: seen.append(n)))
    assert seen == [(4, 6), (6, 6)]


def test_no_prompts_no_answers_and_an_empty_prompt_is_an_error(tiny_model, byte_tokenizer):
    assert list(generate_texts(tiny_model, byte_tokenizer, [])) == []
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        list(generate_texts(tiny_model, byte_tokenizer, [[97], []]))


def test_an_unknown_decoding_option_is_named(tiny_model, byte_tokenizer):
    with pytest.raises(ConfigError, match=r"'max_tokens'\. Did you mean 'max_new_tokens'"):
        list(generate_texts(tiny_model, byte_tokenizer, [[97]], decoding={"max_tokens": 3}))


def test_stop_tokens_come_from_tokenizer_model_and_template(tiny_model, byte_tokenizer):
    end_of_turn = byte_tokenizer.convert_tokens_to_ids("<|im_end|>")
    byte_tokenizer.eos_token = byte_tokenizer.pad_token
    tiny_model.generation_config.eos_token_id = [byte_tokenizer.pad_token_id, 10]
    assert stop_token_ids(tiny_model, byte_tokenizer) == [byte_tokenizer.pad_token_id, 10, end_of_turn]
    tiny_model.generation_config.eos_token_id = None
    byte_tokenizer.chat_template = None
    assert stop_token_ids(tiny_model, byte_tokenizer) == [byte_tokenizer.pad_token_id]


@pytest.mark.parametrize(
    ("template", "stop"),
    [
        ("{% for m in messages %}{{ m.content }} <|im_end|>{% endfor %}", "<|im_end|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
    ],
)
def test_the_templates_stop_token_is_a_control_token_after_the_answer(byte_tokenizer, template, stop):
    expected = None if stop is None else byte_tokenizer.convert_tokens_to_ids(stop)
    assert template_stop_id(byte_tokenizer, template) == expected


def test_a_prompt_ends_where_the_answer_begins(byte_tokenizer):
    prompt = encode_prompt(byte_tokenizer, [{"role": "user", "content": "2+2?"}])
    assert prompt.text == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.input_ids == byte_tokenizer(prompt.text)["input_ids"]


def test_a_prompt_that_cannot_be_rendered_says_why(byte_tokenizer):
    with pytest.raises(DataError, match=r"^row 7: the chat template refuses this conversation: no tools"):
        encode_prompt(byte_tokenizer, [{"role": "user"}], None, "{{ raise_exception('no tools') }}", "row 7: ")
    byte_tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        encode_prompt(byte_tokenizer, [{"role": "user", "content": ""}])
