"""What the model sees when it answers is what it saw before that answer in training."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from tests import tiny
from tests.data.chats import CONTROL, PAIRS, SPACES, WORDS, chats, family_of
from tests.data.test_render import HEADERS, HI, TOOLS
from tests.templates import CHATML
from tunesmith.data.render import render, render_prompt
from tunesmith.data.rows import RowError
from tunesmith.data.tokenize import IGNORE_INDEX, tokenize
from tunesmith.errors import TemplateError


def make_gpt2_like_tokenizer(family="llama3"):
    """Splits white space by what follows it: the header's two line breaks are one token only at the end of a text."""
    tokenizer = tiny.make_bpe_tokenizer(family)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return tokenizer


MAKERS = PAIRS | {"gpt2-llama3": make_gpt2_like_tokenizer}


def prompt_ids(messages, tokenizer, **options):
    return tokenize([render_prompt(messages, tokenizer, **options)], tokenizer)[0]["input_ids"]


def seen_in_training(messages, tokenizer, **options):
    """Ids of the row before its first trained token."""
    (row,) = tokenize([render({"messages": messages}, tokenizer, **options)], tokenizer)
    begin = next(i for i, label in enumerate(row["labels"]) if label != IGNORE_INDEX)
    return row["input_ids"][:begin]


@pytest.mark.parametrize("pair", MAKERS)
@given(data=st.data())
def test_a_prompts_ids_are_those_before_the_answer_in_training(pair, data):
    tokenizer = MAKERS[pair]()
    family = family_of(tokenizer) if "generation" not in pair else ""
    messages = data.draw(chats(family, WORDS + SPACES + CONTROL))
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    assert prompt_ids(messages[:first], tokenizer) == seen_in_training(messages, tokenizer)
    assert prompt_ids(messages[:-1], tokenizer) == seen_in_training(messages, tokenizer, train_on="last_turn")


@pytest.mark.parametrize("answer", ["yes", "\nyes", " yes", "\n\n", "<|im_end|>", "\n<|im_end|>"])
@pytest.mark.parametrize("make", [tiny.make_byte_tokenizer, tiny.make_bpe_tokenizer])
def test_the_answers_beginning_does_not_change_its_prompt(make, answer):
    tokenizer, asked = make(), [{"role": "user", "content": "a<|im_end|>\n"}]
    messages = [*asked, {"role": "assistant", "content": answer}]
    assert prompt_ids(asked, tokenizer) == seen_in_training(messages, tokenizer)


def test_white_space_that_is_split_by_what_follows_is_kept_together():
    tokenizer, changed = make_gpt2_like_tokenizer(), []
    assert [len(tokenizer.encode(text)) for text in ("\n\n", "\n\n4")] == [1, 3]
    (row,) = tokenize([render({"messages": HI}, tokenizer)], tokenizer, lambda *change: changed.append(change))
    assert row["input_ids"][: len(prompt_ids(HI[:1], tokenizer))] == prompt_ids(HI[:1], tokenizer)
    assert changed == [(0, "split-at-boundary")]


def test_control_tokens_of_a_person_are_text_in_a_prompt(byte_tokenizer):
    prompt = render_prompt([{"role": "user", "content": "a<|im_end|>"}], byte_tokenizer)
    assert prompt.text == "<|im_start|>user\na<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    assert (prompt.spans, [prompt.text[slice(*literal)] for literal in prompt.literal]) == ([], ["<|im_end|>"])
    stop = byte_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenize([prompt], byte_tokenizer)[0]["input_ids"].count(stop) == 1


def test_a_header_that_only_an_answer_brings_is_part_of_the_prompt(byte_tokenizer):
    prompt = render_prompt(HI[:1], byte_tokenizer, chat_template=HEADERS)
    assert prompt.text == "### user:\n2+2?\n### assistant:\n"
    assert prompt_ids(HI[:1], byte_tokenizer, chat_template=HEADERS) == seen_in_training(
        HI, byte_tokenizer, chat_template=HEADERS
    )


@pytest.mark.parametrize("pair", PAIRS)
def test_an_answer_may_open_the_conversation(pair):
    tokenizer = PAIRS[pair]()
    if family_of(tokenizer) != "mistral":  # insists on a question
        assert prompt_ids([], tokenizer) == seen_in_training([HI[1], HI[0]], tokenizer)


def test_calls_results_and_tools_are_part_of_a_prompt(byte_tokenizer):
    tools = [{"name": "f<|pad|>"}]
    row = render({"messages": TOOLS, "tools": tools}, byte_tokenizer, train_on="last_turn")
    prompt = render_prompt(TOOLS[:-1], byte_tokenizer, tools=tools)
    assert prompt.text == row.text[: row.spans[0].start]
    assert prompt.literal == row.literal != []


def test_our_own_keys_and_none_do_not_reach_the_template(byte_tokenizer):
    flagged = [{**HI[0], "train": False, "weight": None, "name": None}]
    assert render_prompt(flagged, byte_tokenizer) == render_prompt(HI[:1], byte_tokenizer)


@pytest.mark.parametrize(
    ("template", "error", "words"),
    [
        ("<|im_start|>", TemplateError, r"does not write turn 1 \(user\)"),
        (CHATML.replace("tools %}", "0 %}"), TemplateError, "does not write the tool 'f'"),
        ("{{ raise_exception('no') }}", TemplateError, "refuses this conversation: no"),
        (CHATML.replace("message.content", "message.content.split('<|im')[0]"), RowError, "contains a control token"),
    ],
)
def test_a_prompt_is_refused_where_training_would_refuse_it(byte_tokenizer, template, error, words):
    messages, tools = [{"role": "user", "content": "a<|im_end|>b"}], [{"name": "f"}]
    with pytest.raises(error, match=f"^a.jsonl row 3: .*{words}"):
        render_prompt(messages, byte_tokenizer, tools=tools, chat_template=template, where="a.jsonl row 3: ")
