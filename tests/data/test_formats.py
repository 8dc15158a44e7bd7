"""What a row of every format means."""

import pytest

from tests.data.examples import ALPACA, CALL, HELLO, HI, SYSTEM, example, rows
from tunesmith.data.detect import detect_format
from tunesmith.data.formats import FORMATS
from tunesmith.data.rows import RowError

BYE = HELLO | {"content": "bye"}

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
    "preference": (
        {"prompt": "hi", "chosen": "hello", "rejected": "bye"},
        {"prompt": [HI], "chosen": [HELLO], "rejected": [BYE]},
    ),
}


# reliability: 35
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_has_a_meaning_and_is_detected(format):
    value, meaning = MEANINGS[format]
    assert example(value, format) == meaning
    stage = "rm" if format == "preference" else "sft"
    assert detect_format(rows(value, value), stage=stage) == format
    assert FORMATS[format].doc


# reliability: 35
def test_a_missing_column_is_named_with_those_present_and_the_nearest():
    with pytest.raises(
        RowError, match=r"no column 'output'; the row has instruction, ouput\. Did you mean 'ouput'\?"
    ) as caught:
        example({"instruction": "a", "ouput": "b"}, "alpaca")
    assert caught.value.reason == "missing-column"


# Alpaca


# workflow: P1
@pytest.mark.parametrize(
    ("instruction", "input", "question"), [("Add.", "2+2", "Add.\n2+2"), ("Add.", "", "Add."), ("", "2+2", "2+2")]
)
def test_instruction_and_input_are_one_question(instruction, input, question):
    value = {"instruction": instruction, "input": input, "output": "4"}
    assert example(value, "alpaca")["messages"] == [{"role": "user", "content": question}, HELLO | {"content": "4"}]


@pytest.mark.parametrize(
    "value", [ALPACA | {"input": ""}, ALPACA | {"input": None}, {"instruction": "Add.", "output": "4"}]
)
def test_an_empty_input_adds_nothing_to_the_instruction(value):
    assert example(value, "alpaca")["messages"][0]["content"] == "Add."


# workflow: P1
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
        ({"history": 5}, "bad-history"),
        ({"history": "a"}, "bad-history"),
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


def test_functions_of_older_files_are_tools():
    turns, function = [HI, HELLO], {"name": "f", "parameters": {}}
    made = example({"messages": turns, "functions": [function]}, "messages")
    assert made == {"messages": turns, "tools": [{"type": "function", "function": function}]}
    assert example({"messages": turns, "functions": ["sort"]}, "messages") == {"messages": turns}


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


# Preferences

SHARED = [SYSTEM, HI]
PAIR = {"prompt": [HI], "chosen": [HELLO], "rejected": [BYE]}
THREE = [HI, HELLO, HI]
TWO_LINES = HI | {"content": "h\ni"}
TOOL = {"type": "function", "function": {"name": "f"}}
ULTRAFEEDBACK = {"prompt": "hi", "prompt_id": "1f", "score_chosen": 8.0, "score_rejected": 6.5} | {
    "chosen": [HI, HELLO],
    "rejected": [HI, BYE],
    "messages": [HI, HELLO],
}
GPT = [{"from": "gpt", "value": text} for text in ("hello", "bye")]
ASKED = {"from": "human", "value": "hi"}


# workflow: P6
@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ({"instruction": "hi", "output": ["hello", "bye"]}, PAIR),
        ({"instruction": "hi", "output": ["hello", "bye", "not read"]}, PAIR),
        ({"instruction": "h", "input": "i", "chosen": "hello", "rejected": "bye"}, PAIR | {"prompt": [TWO_LINES]}),
        ({"prompt": "hi", "system": "Be brief.", "chosen": "hello", "rejected": "bye"}, PAIR | {"prompt": SHARED}),
        ({"conversations": [{"from": "human", "value": "hi"}], "chosen": GPT[0], "rejected": GPT[1]}, PAIR),
        ({"messages": THREE, "chosen": HELLO, "rejected": BYE}, PAIR | {"prompt": THREE}),
        ({"prompt": [HI], "chosen": [HELLO], "rejected": [BYE]}, PAIR),
        ({"chosen": [HI, HELLO], "rejected": [HI, BYE]}, PAIR),
        ({"chosen": [HI, HELLO], "rejected": [HI, BYE], "prompt": "hi"}, PAIR),
        ({"chosen": [SYSTEM, HI, HELLO], "rejected": [SYSTEM, HI, BYE]}, PAIR | {"prompt": SHARED}),
        (ULTRAFEEDBACK, PAIR),
        ({"messages": [HI, HELLO], "chosen": [HI, HELLO], "rejected": [HI, BYE]}, PAIR),
        ({"conversations": [ASKED, GPT[0]], "chosen": [ASKED, GPT[0]], "rejected": [ASKED, GPT[1]]}, PAIR),
        ({"prompt": "hi", "messages": [HI, HELLO], "chosen": "hello", "rejected": "bye"}, PAIR),
        ({"prompt": "hi", "chosen": [HI, HELLO], "rejected": [BYE]}, PAIR),
        ({"prompt": THREE, "chosen": "hello", "rejected": [*THREE, BYE]}, PAIR | {"prompt": THREE}),
        (
            {"chosen": [HI, HELLO, HI, BYE], "rejected": [HI, BYE, HI, BYE]},
            {"prompt": [HI], "chosen": [HELLO, HI, BYE], "rejected": [BYE, HI, BYE]},
        ),
        (
            {"prompt": "hi", "chosen": "hello", "rejected": "bye", "tools": [TOOL["function"]]},
            PAIR | {"tools": [TOOL]},
        ),
    ],
)
def test_a_better_and_a_worse_answer_are_read_from_every_shape(value, meaning):
    assert detect_format(rows(value), stage="rm") == "preference"
    assert example(value, "preference") == meaning


# workflow: P2
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": ""}, "one-answer"),
        ({"rejected": None}, "one-answer"),
        ({"rejected": []}, "one-answer"),
        ({"rejected": "  "}, "empty-answer"),
        ({"rejected": "hello"}, "same-answer"),
        ({"chosen": [HELLO, HI]}, "ends-with-user"),
        ({"chosen": 3}, "bad-messages"),
        ({"prompt": " "}, "empty-prompt"),
        ({"prompt": []}, "bad-messages"),
        ({"prompt": None}, "no-prompt"),
        ({"prompt": [SYSTEM]}, "no-prompt"),
        ({"prompt": "other", "chosen": [HI, HELLO], "rejected": [HI, BYE]}, "two-prompts"),
        ({"prompt": None, "chosen": [HI, HELLO], "rejected": [SYSTEM, HI, BYE]}, "no-prompt"),
        ({"prompt": "other", "chosen": [HI, HELLO]}, "two-prompts"),
        ({"chosen": [HI]}, "no-assistant"),
    ],
)
def test_a_pair_of_answers_that_cannot_be_compared_has_a_reason(change, reason):
    with pytest.raises(RowError, match=r"^a\.jsonl:7: ") as caught:
        example({"prompt": "hi", "chosen": "hello", "rejected": "bye"} | change, "preference")
    assert caught.value.reason == reason


# workflow: P2
def test_a_list_of_one_answer_cannot_be_compared():
    with pytest.raises(RowError, match=r"expected \[better, worse\]") as caught:
        example({"instruction": "hi", "output": ["hello"]}, "preference")
    assert caught.value.reason == "one-answer"


def test_the_system_prompt_goes_to_pairs_that_have_none():
    value = {"prompt": "hi", "chosen": "hello", "rejected": "bye"}
    assert example(value, "preference", system_prompt="Be brief.")["prompt"] == SHARED


# Prompts that are to be answered


# workflow: P2
@pytest.mark.parametrize(
    ("value", "format", "meaning"),
    [
        ({"instruction": "hi"}, "alpaca", {"messages": [HI]}),
        ({"instruction": "hi", "output": None}, "alpaca", {"messages": [HI]}),
        ({"instruction": "hi", "output": "hello"}, "alpaca", {"messages": [HI, HELLO]}),
        ({"prompt": "hi"}, "prompt-completion", {"prompt": "hi"}),
        ({"prompt": "hi", "completion": ""}, "prompt-completion", {"prompt": "hi"}),
        ({"prompt": [HI], "completion": None}, "prompt-completion", {"messages": [HI]}),
        ({"prompt": "hi", "completion": "hello"}, "prompt-completion", {"prompt": "hi", "completion": "hello"}),
        ({"messages": [HI]}, "messages", {"messages": [HI]}),
        ({"messages": [HI, HELLO | {"content": ""}]}, "messages", {"messages": [HI]}),
        ({"conversations": THREE}, "sharegpt", {"messages": THREE}),
    ],
)
def test_a_row_without_an_answer_is_a_prompt_where_none_is_needed(value, format, meaning):
    assert detect_format(rows(value), answers_needed=False) == format
    assert example(value, format, answers_needed=False) == meaning


@pytest.mark.parametrize(
    ("value", "format", "reason"),
    [
        ({"instruction": ""}, "alpaca", "empty-prompt"),
        ({"prompt": " "}, "prompt-completion", "empty-prompt"),
        ({"messages": [SYSTEM]}, "messages", "empty-prompt"),
        ({"messages": [HELLO]}, "messages", "assistant-first"),
    ],
)
def test_a_prompt_that_asks_nothing_has_a_reason(value, format, reason):
    with pytest.raises(RowError) as caught:
        example(value, format, answers_needed=False)
    assert caught.value.reason == reason
