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
    answer_decoding,
    answering,
    decode_answer,
    encode_prompt,
    generate_batch,
    generate_ids,
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


# workflow: R2
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


# workflow: R8
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


# workflow: A5
@pytest.mark.parametrize("top", [{}, {"top_k": 5}, {"top_p": 0.5}, {"repetition_penalty": 1.5}])
def test_a_sampled_answer_does_not_depend_on_the_rows_beside_it(tiny_model, byte_tokenizer, top):
    decoding = SHORT | {"do_sample": True, "temperature": 1.5, **top}
    found = [
        dict(generate_texts(tiny_model, byte_tokenizer, IDS, seed=7, decoding=decoding | {"generation_batch_size": n}))
        for n in (1, 2, 6)
    ]
    other = dict(generate_texts(tiny_model, byte_tokenizer, IDS, seed=8, decoding=decoding))
    assert found[0] == found[1] == found[2] != other
    shares = [
        dict(generate_texts(tiny_model, byte_tokenizer, IDS, seed=7, decoding=decoding, share=(r, 2))) for r in (0, 1)
    ]
    assert not shares[0].keys() & shares[1].keys()
    assert shares[0] | shares[1] == found[0]


def test_sampling_with_beams_repeats_and_leaves_torchs_random_numbers_alone(tiny_model, byte_tokenizer):
    decoding = SHORT | {"do_sample": True, "num_beams": 2}
    state, found = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        found.append(dict(generate_texts(tiny_model, byte_tokenizer, IDS, seed=seed, decoding=decoding)))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1] != found[2]


# workflow: C3
def test_beams_are_used(tiny_model, byte_tokenizer):
    decoding = answer_decoding(SHORT | {"eval_num_beams": 4}, generation_num_beams=1)
    found = dict(generate_texts(tiny_model, byte_tokenizer, IDS, decoding=decoding))
    assert found != dict(generate_texts(tiny_model, byte_tokenizer, IDS, decoding=SHORT))
    stops = stop_token_ids(tiny_model, byte_tokenizer)
    config = GenerationConfig(num_beams=4, max_new_tokens=12, eos_token_id=stops, pad_token_id=258)
    for number, prompt in enumerate(IDS):
        ids = torch.tensor([prompt])
        new = tiny_model.eval().generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert found[number] == decode_answer(byte_tokenizer, new[0, len(prompt) :].tolist(), stops)


# workflow: C2 C3
def test_which_option_decides_about_beams_and_length():
    train = {"generation_max_length": 30, "generation_num_beams": 2, "max_target_length": 20}
    most = answer_decoding(DecodingConfig(max_new_tokens=40, num_beams=4, eval_num_beams=3), **train)
    assert (most["max_new_tokens"], most["num_beams"]) == (40, 3)
    assert answer_decoding(most, **train | {"generation_num_beams": None}) == most
    found = [answer_decoding(None, **dict(list(train.items())[place:])) for place in (0, 1, 2, 3)]
    assert [each["max_new_tokens"] for each in found] == [30, 20, 20, 256]
    assert [each["num_beams"] for each in found] == [2, 2, 1, 1]
    with pytest.raises(ConfigError, match="'num_beam'"):
        answer_decoding({"num_beam": 3})


# workflow: A5
def test_every_decoding_option_reaches_transformers_and_no_max_length_does():
    given = {"do_sample": True, "temperature": 0.95, "top_p": 0.7, "top_k": 50, "num_beams": 2}
    given |= {"max_new_tokens": 512, "repetition_penalty": 1.1, "length_penalty": 2.0}
    found = generation_config(given, [257, 5], pad_id=258)
    assert found.to_diff_dict().items() >= {**given, "top_k": 50}.items() - {("top_k", 50)}
    assert (found.top_k, found.eos_token_id, found.pad_token_id) == (50, [257, 5], 258)
    assert found.to_dict().get("max_length") is None


# workflow: A5
def test_the_length_penalty_changes_what_beams_find(tiny_model, byte_tokenizer):
    short, long = (
        generate_batch(
            tiny_model,
            [IDS[0]],
            generation_config({"num_beams": 4, "length_penalty": penalty, "max_new_tokens": 8}, range(0, 259, 2), 258),
        )
        for penalty in (-50.0, 50.0)
    )
    assert len(short[0]) < len(long[0])


@pytest.fixture(params=["one", "many", "all"])
def broken_model(tiny_model, request):
    """Logits with NaN and both infinities among them."""

    def spoil(module, arguments, logits):
        logits = logits.clone()
        if request.param == "all":
            return torch.full_like(logits, torch.nan)
        logits[..., 40] = torch.nan
        logits[..., 50] = -torch.inf
        if request.param == "many":
            logits[..., 60:70] = torch.inf
        return logits

    tiny_model.lm_head.register_forward_hook(spoil)
    return tiny_model


# workflow: R7
@pytest.mark.parametrize(
    "decoding",
    [
        {},
        {"do_sample": True, "temperature": 0.1, "top_p": 0.9, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True, "temperature": 0.5},
    ],
    ids=["greedy", "sampling", "beams", "both"],
)
def test_logits_that_are_no_numbers_do_not_stop_generation(broken_model, byte_tokenizer, decoding):
    answers = dict(generate_texts(broken_model, byte_tokenizer, IDS, decoding=SHORT | decoding, seed=1))
    assert answers.keys() == set(range(6))


# workflow: R8
def test_an_answer_ends_at_the_end_of_turn_of_a_base_models_template(tiny_model, byte_tokenizer):
    end_of_turn = byte_tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        tiny_model.lm_head.weight[end_of_turn] = 10 * tiny_model.lm_head.weight[byte_tokenizer.eos_token_id]
    ends = [
        generate_batch(tiny_model, [prompt], generation_config(SHORT, stop_token_ids(tiny_model, byte_tokenizer), 258))
        for prompt in IDS
    ]
    assert any(new[0][-1] == end_of_turn and len(new[0]) < 12 for new in ends)
    assert all("<|im_end|>" not in text for _, text in generate_texts(tiny_model, byte_tokenizer, IDS, decoding=SHORT))


def test_answers_end_where_the_models_positions_do(make_tiny_model, byte_tokenizer):
    model = make_tiny_model(max_position_embeddings=40)
    free = dict(generate_ids(model, dict(enumerate(IDS)), generation_config(SHORT, [], 258), batch_size=4))
    assert [len(free[number]) for number in range(6)] == [12, 4, 12, 12, 12, 12]  # the second prompt has 36 tokens
    with pytest.raises(DataError, match=r"prompt 0 has 40 tokens, but the model reads 40 at most"):
        list(generate_texts(model, byte_tokenizer, [[97] * 40], decoding=SHORT))


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


# workflow: R8
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
