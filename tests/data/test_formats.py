"""What a row of every format means."""

import pytest

from tests.data.examples import ALPACA, CALL, HELLO, HI, SYSTEM, example, rows
from tunesmith.data.detect import detect_format
from tunesmith.data.formats import FORMATS
from tunesmith.data.rows import RowError

# One test case per format: a row and what it means

MEANINGS = {
    "alpaca": (
        ALPACA,
        {"messages": [{"role": "user", "content": "Add.\n2+2"}, {"role": "assistant", "content": "4"}]},
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"messages": [HI, HELLO]},
    ),
    "messages": ({"messages": [SYSTEM, HI, HELLO]}, {"messages": [SYSTEM, HI, HELLO]}),
    "prompt-completion": ({"prompt": "2+2=", "completion": "4"}, {"prompt": "2+2=", "completion": "4"}),
    "text": ({"text": "Once."}, {"text": "Once."}),
}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_has_a_meaning_and_is_detected(format):
    value, meaning = MEANINGS[format]
    assert example(value, format) == meaning
    assert detect_format(rows(value, value)) == format
    assert FORMATS[format].doc


def test_a_missing_column_is_named_with_those_present_and_the_nearest():
    with pytest.raises(
        RowError, match=r"no column 'output'; the row has instruction, ouput\. Did you mean 'ouput'\?"
    ) as caught:
        example({"instruction": "a", "ouput": "b"}, "alpaca")
    assert caught.value.reason == "missing-column"


# Alpaca


@pytest.mark.parametrize(
    "value", [ALPACA | {"input": ""}, ALPACA | {"input": None}, {"instruction": "Add.", "output": "4"}]
)
def test_an_empty_input_adds_nothing_to_the_instruction(value):
    assert example(value, "alpaca")["messages"][0]["content"] == "Add."


def test_alpaca_history_and_system_come_before_the_question():
    value = ALPACA | {"history": [["a", "b"], ("c", "d")], "system": "Be brief."}
    turns = example(value, "alpaca")["messages"]
    assert [turn["role"] for turn in turns] == ["system", *["user", "assistant"] * 3]
    assert [turn["content"] for turn in turns] == ["Be brief.", "a", "b", "c", "d", "Add.\n2+2", "4"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output": ""}, "empty-answer"),
        ({"output": " \n"}, "empty-answer"),
        ({"output": None}, "bad-content"),
        ({"output": 4}, "bad-content"),
        ({"input": ["2+2"]}, "bad-content"),
        ({"instruction": "", "input": ""}, "empty-prompt"),
        ({"history": ["a", "b"]}, "bad-history"),
        ({"system": 3}, "bad-content"),
    ],
)
def test_an_alpaca_row_that_cannot_be_used_has_a_reason(change, reason):
    with pytest.raises(RowError, match=r"^a\.jsonl:7: ") as caught:
        example(ALPACA | change, "alpaca")
    assert caught.value.reason == reason


# ShareGPT


def test_sharegpt_roles_become_the_templates_roles():
    turns = [("system", "s"), ("human", "h"), ("function_call", "not json"), ("observation", "o"), ("gpt", "g")]
    value = {"conversations": [{"from": role, "value": content} for role, content in turns]}
    roles = [turn["role"] for turn in example(value, "sharegpt")["messages"]]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]


def test_a_function_call_becomes_a_tool_call():
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    turns = [
        {"from": "human", "value": "hi"},
        call,
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "1"},
    ]
    made = example({"conversations": turns}, "sharegpt")["messages"]
    assert made[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize("content", ["not json", '{"name": "f"}', "3", "[]"])
def test_a_function_call_that_is_no_call_stays_text(content):
    turns = [{"from": "human", "value": "hi"}, {"from": "function_call", "value": content}]
    made = example({"conversations": turns}, "sharegpt")["messages"]
    assert made[1] == {"role": "assistant", "content": content}


def test_conversations_may_be_written_as_role_and_content():
    assert example({"conversations": [HI, HELLO]}, "sharegpt") == {"messages": [HI, HELLO]}


def test_the_system_column_comes_first_and_may_repeat_the_system_turn():
    value = {"conversations": [HI, HELLO], "system": "Be brief."}
    assert example(value, "sharegpt")["messages"] == [SYSTEM, HI, HELLO]
    assert example(value | {"conversations": [SYSTEM, HI, HELLO]}, "sharegpt")["messages"] == [SYSTEM, HI, HELLO]
    with pytest.raises(RowError, match="a 'system' column and a system turn that differ"):
        example(value | {"conversations": [SYSTEM | {"content": "Rhyme."}, HI, HELLO]}, "sharegpt")
