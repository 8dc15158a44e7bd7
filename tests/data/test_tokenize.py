"""Ids are apply_chat_template's; trained tokens are exactly the answers and their stop tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import ByT5Tokenizer

from tests import tiny
from tests.data.chats import CONTROL, PAIRS, SPACES, WORDS, answer, chats, family_of
from tunesmith.data.render import Rendered, Span, control_tokens, render
from tunesmith.data.rows import RowError
from tunesmith.data.tokenize import IGNORE_INDEX, added_tokens, tokenize, truncate

pairs = pytest.mark.parametrize("pair", PAIRS)


def trained_text(tokens, tokenizer) -> str:
    """The trained tokens as text; a control token in front keeps SentencePiece-like decoders from eating a space."""
    ids = [id for id, label in zip(tokens["input_ids"], tokens["labels"]) if label != IGNORE_INDEX]
    front = tokenizer.pad_token
    return tokenizer.decode([tokenizer.pad_token_id, *ids]).removeprefix(front)


# reliability: 41, 43
@pairs
@given(data=st.data())
def test_ids_are_those_of_apply_chat_template_and_trained_tokens_are_the_answers(pair, data):
    tokenizer = PAIRS[pair]()
    family = family_of(tokenizer)
    messages = data.draw(chats(family if "generation" not in pair else "", WORDS + SPACES))
    changed = []
    (tokens,) = tokenize(
        [render({"messages": messages}, tokenizer)], tokenizer, lambda *change: changed.append(change)
    )
    expected_ids = tokenizer.apply_chat_template(messages)["input_ids"]
    assert tokenizer.decode(tokens["input_ids"]) == tokenizer.decode(expected_ids)
    assert tokens["input_ids"] == expected_ids or changed == [(0, "split-at-boundary")]
    answers = [answer(message, family) for message in messages if message["role"] == "assistant"]
    assert trained_text(tokens, tokenizer) == "".join(answers)


# reliability: 42
@pairs
@given(data=st.data())
def test_control_tokens_in_content_stay_text(pair, data):
    tokenizer = PAIRS[pair]()
    family = family_of(tokenizer)
    messages = data.draw(chats(family if "generation" not in pair else "", WORDS + CONTROL))
    (tokens,) = tokenize([render({"messages": messages}, tokenizer)], tokenizer)
    control_ids = set(tokenizer.convert_tokens_to_ids(list(control_tokens(tokenizer))))
    empty = [
        {key: "" if key == "content" else value for key, value in m.items() if key != "tool_calls"} for m in messages
    ]
    template_ids = tokenizer.apply_chat_template(empty)["input_ids"]
    assert [id for id in tokens["input_ids"] if id in control_ids] == [id for id in template_ids if id in control_ids]
    answers = [answer(message, family) for message in messages if message["role"] == "assistant"]
    assert trained_text(tokens, tokenizer) == "".join(answers)


@given(
    prompt=st.sampled_from(["Q: ", "Q:", "", "Q:\n", "世"]),
    completion=st.sampled_from(["yes", " yes", "\nyes", "界", ""]),
)
@pytest.mark.parametrize(
    "make", [tiny.make_byte_tokenizer, tiny.make_bpe_tokenizer, tiny.make_sentencepiece_like_tokenizer]
)
def test_without_a_template_exactly_completion_and_stop_are_trained(make, prompt, completion):
    tokenizer = make()
    tokenizer.chat_template = None
    (tokens,) = tokenize([render({"prompt": prompt, "completion": completion}, tokenizer)], tokenizer)
    if prompt or "sentencepiece" not in make.__name__:  # the space that begins the text belongs to its first token
        assert trained_text(tokens, tokenizer) == completion + tokenizer.eos_token


def test_a_token_across_the_edge_is_split_and_counted(bpe_tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\nb"}]
    changed = []
    (tokens,) = tokenize([render({"messages": messages}, bpe_tokenizer)], bpe_tokenizer, lambda *c: changed.append(c))
    assert changed == [(0, "split-at-boundary")]
    assert trained_text(tokens, bpe_tokenizer) == "\nb<|im_end|>"
    prompt = bpe_tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert tokens["input_ids"][: len(prompt)] == prompt


def test_trimmed_offsets_do_not_hide_a_space_of_the_prompt(bpe_tokenizer):
    text = "the answer is yes"
    (tokens,) = tokenize([Rendered(text, [Span(14, 17)])], bpe_tokenizer)
    assert trained_text(tokens, bpe_tokenizer) == "yes"


def test_weights_appear_only_where_one_is_not_1(byte_tokenizer):
    plain, weighted = tokenize(
        [Rendered("abc", [Span(1, 3)]), Rendered("abc", [Span(1, 2, 0.5), Span(2, 3)])], byte_tokenizer
    )
    assert plain == {"input_ids": [97, 98, 99], "labels": [-100, 98, 99]}
    assert weighted["weights"] == [1.0, 0.5, 1.0]


def test_bos_is_put_in_front_once_and_only_where_the_tokenizer_does(byte_tokenizer, sentencepiece_like_tokenizer):
    bos = sentencepiece_like_tokenizer.bos_token_id
    rows = [Rendered("hi", [Span(0, 2)], add_bos=True), Rendered("<s>hi", [Span(3, 5)], add_bos=True)]
    first, second = tokenize(rows, sentencepiece_like_tokenizer)
    assert [tokens["input_ids"].count(bos) for tokens in (first, second)] == [1, 1]
    assert (first["input_ids"][0], first["labels"][0]) == (bos, IGNORE_INDEX)
    assert tokenize(rows[:1], byte_tokenizer)[0]["input_ids"] == [104, 105]


def test_a_stop_token_that_swallows_the_line_break_behind_it_is_trained():
    tokenizer = tiny.make_byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [_swallowing("<|end|>")]})
    (tokens,) = tokenize([Rendered("q\na<|end|>\nq", [Span(2, 10)])], tokenizer)
    assert tokens["labels"] == [-100, -100, 97, tokenizer.convert_tokens_to_ids("<|end|>"), -100]


def test_a_header_that_swallows_white_space_leaves_the_answers_own():
    tokenizer = tiny.make_byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [_swallowing("<|assistant|>")]})
    (tokens,) = tokenize([Rendered("<|assistant|>\n\n a", [Span(14, 17)])], tokenizer)
    assert tokens["labels"] == [-100, 10, 32, 97]


def test_a_tokenizer_without_offsets_labels_by_prefixes():
    tokenizer = ByT5Tokenizer()
    (tokens,) = tokenize([Rendered("ab</s>", [Span(1, 6)])], tokenizer)
    assert tokens == {"input_ids": [100, 101, 1], "labels": [-100, 101, 1]}


def test_a_tokenizer_without_offsets_refuses_where_prefixes_disagree():
    tokenizer = ByT5Tokenizer()
    with pytest.raises(RowError, match=r"gives no offsets.*Use the model's fast tokenizer") as caught:
        tokenize([Rendered("ab</s>", [Span(3, 6)])], tokenizer)
    assert caught.value.reason == "no-offsets"


def test_a_row_that_cannot_be_labelled_is_reported_and_comes_back_empty():
    tokenizer, errors = ByT5Tokenizer(), []
    rows = [Rendered("ab", [Span(1, 2)]), Rendered("a</s>", [Span(0, 1)], [(1, 5)])]
    results = tokenize(rows, tokenizer, on_error=lambda index, error: errors.append((index, error.reason)))
    assert errors == [(1, "no-offsets")]
    assert results[1] == {"input_ids": [], "labels": []}


def test_truncation_keeps_the_first_tokens_and_adds_no_stop():
    tokens = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "weights": [1.0, 1.0, 0.5]}
    assert truncate(tokens, 2) == {"input_ids": [1, 2], "labels": [-100, 2], "weights": [1.0, 1.0]}


def test_the_tokenizer_is_left_as_it_was(bpe_tokenizer):
    before = bpe_tokenizer.backend_tokenizer.to_str()
    messages = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "\n"}]
    tokenize([render({"messages": messages}, bpe_tokenizer)], bpe_tokenizer)
    assert bpe_tokenizer.backend_tokenizer.to_str() == before
    assert not bpe_tokenizer.backend_tokenizer.encode_special_tokens


def _swallowing(token: str):
    from tokenizers import AddedToken

    return AddedToken(token, rstrip=True, special=True)


def test_a_cut_on_the_left_keeps_the_last_tokens():
    tokens = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    assert truncate(tokens, 2, "left") == {"input_ids": [2, 3], "labels": [2, 3]}


def test_what_a_tokenizer_puts_around_a_text_is_found_and_put_there_once():
    tokenizer = tiny.make_byte_tokenizer("mistral")
    special = [("<s>", 256), ("</s>", 257)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A </s>", special_tokens=special
    )
    assert added_tokens(tokenizer) == ([256, 256], [257])
    rows = [
        Rendered("hi", [Span(0, 2)], add_bos=True, add_suffix=True),
        Rendered("hi</s>", [Span(0, 6)], add_suffix=True),
        Rendered("hi", [Span(0, 2, 0.5)], add_suffix=True),
    ]
    first, second, third = tokenize(rows, tokenizer)
    assert first == {"input_ids": [256, 256, 104, 105, 257], "labels": [-100, -100, 104, 105, 257]}
    assert second == {"input_ids": [104, 105, 257], "labels": [104, 105, 257]}
    assert third == {"input_ids": [104, 105, 257], "labels": [104, 105, 257], "weights": [0.5, 0.5, 0.5]}
