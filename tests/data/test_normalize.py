"""What may be trained on and in which shape, columns, formats of one's own, duplicates."""

import json
import time
from pathlib import Path

import pytest

from tests.data.examples import ALPACA, CALL, HELLO, HI, SYSTEM, example, messages, rows
from tests.data.files import load
from tunesmith.data.detect import detect_format
from tunesmith.data.normalize import count_duplicates, find_overlap, normalize
from tunesmith.data.rows import RowError
from tunesmith.errors import ConfigError

REAL = Path(__file__).parents[3] / "shared" / "data"


def test_normalizing_leaves_the_row_as_it_was():
    value = {"messages": [HI | {"content": [{"type": "text", "text": "hi"}]}, HELLO], "tools": "[]"}
    before = repr(value)
    example(value, "messages", system_prompt="Be brief.")
    assert repr(value) == before


# Turns


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "value": "lo"}]
    assert messages(HI, HELLO | {"content": parts}) == [HI, HELLO]


def test_train_flags_and_weights_are_kept_and_loss_weight_is_a_weight():
    made = messages(HI, HELLO | {"train": False}, HI, HELLO | {"loss_weight": 0.5}, HI, HELLO | {"weight": 1})
    assert [turn.get("train") for turn in made] == [None, False, None, None, None, None]
    assert [turn.get("weight") for turn in made] == [None, None, None, 0.5, None, 1.0]


def test_loss_of_a_turn_says_whether_it_trains():
    made = messages(HI, HELLO | {"loss": False}, HI, HELLO | {"loss": True, "train": True})
    assert made == [HI, HELLO | {"train": False}, HI, HELLO | {"train": True}]


@pytest.mark.parametrize("given", [{"loss": True, "train": False}, {"weight": 1, "loss_weight": 0.5}])
def test_two_names_of_one_key_may_not_differ(given):
    with pytest.raises(RowError, match=f"{' and '.join(given)} of turn 2 say different things"):
        messages(HI, HELLO | given)


def test_other_keys_pass_through_unless_they_are_null():
    turn = HELLO | {"reasoning_content": "hm", "tool_calls": None, "name": None}
    assert messages(HI, turn) == [HI, HELLO | {"reasoning_content": "hm"}]


def test_an_assistant_that_calls_a_tool_needs_no_content():
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    tool = {"role": "tool", "content": "1", "tool_call_id": "a"}
    assert messages(HI, calls, tool, HELLO) == [HI, calls | {"content": ""}, tool, HELLO]


@pytest.mark.parametrize(
    "calls",
    [
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": json.dumps(CALL)},
        {"tool_calls": [json.dumps(CALL)]},
        {"tool_calls": CALL},
        {"function_call": CALL["function"]},
        {"function_call": json.dumps(CALL["function"]), "tool_calls": None},
    ],
)
def test_tool_calls_take_one_shape(calls):
    spoken = {"role": "assistant", "content": None} | calls
    result = {"role": "function", "name": "f", "content": "1"}
    made = messages(HI, spoken, result, HELLO)
    assert made == [HI, {"role": "assistant", "content": "", "tool_calls": [CALL]}, result | {"role": "tool"}, HELLO]


def test_no_tool_calls_leave_no_trace():
    assert messages(HI, HELLO | {"tool_calls": "[]", "function_call": {}}) == [HI, HELLO]


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ({"tool_calls": 5}, r"'tool_calls' of turn 2 holds a number \(5\); expected calls such as"),
        ({"tool_calls": ["x"]}, r"'tool_calls' of turn 2 is not valid JSON"),
        ({"tool_calls": [{"function": "f"}]}, r"'tool_calls' of turn 2 holds an object"),
        ({"function_call": "f("}, r"'function_call' of turn 2 is not valid JSON"),
        ({"function_call": {"arguments": {}}}, r"'function_call' of turn 2 holds an object"),
        ({"function_call": CALL, "tool_calls": [CALL]}, r"turn 2 has tool_calls and function_call"),
    ],
)
def test_tool_calls_that_are_none_are_named(calls, message):
    with pytest.raises(RowError, match=message) as caught:
        messages(HI, HELLO | calls)
    assert caught.value.reason == "bad-tool-calls"


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
@pytest.mark.parametrize("value", [-1, "1", True, float("inf"), float("nan")])
def test_a_weight_is_a_number_from_zero_on(key, value):
    with pytest.raises(RowError, match=f"'{key}' of turn 2 is .* expected a number from 0 on"):
        messages(HI, HELLO | {key: value})


def test_a_train_flag_is_true_or_false():
    for key in ("train", "loss"):
        with pytest.raises(RowError, match=rf"'{key}' of turn 2 is a number \(1\); expected true or false"):
            messages(HI, HELLO | {key: 1})


# reliability: 36
@pytest.mark.parametrize(
    ("content", "reason", "message"),
    [
        (None, "bad-content", "the content of turn 1 is null"),
        (5, "bad-content", r"the content of turn 1 is a number \(5\)"),
        ({"a": 1}, "bad-content", "the content of turn 1 is an object"),
        (["hi"], "not-text", r"turn 1 holds 'hi'; only text"),
        ([{"type": "image", "url": "x"}], "not-text", "turn 1 holds a part of type 'image'; only text"),
        ([{"type": "text"}], "not-text", "turn 1 holds {'type': 'text'}"),
    ],
)
def test_content_that_is_no_text_is_named(content, reason, message):
    with pytest.raises(RowError, match=message) as caught:
        messages(HI | {"content": content}, HELLO)
    assert caught.value.reason == reason


# reliability: 36
def test_content_that_is_missing_is_named():
    with pytest.raises(RowError, match="turn 1 has no content"):
        messages({"role": "user"}, HELLO)


# reliability: 36
@pytest.mark.parametrize(
    ("turns", "found"),
    [
        (None, "null"),
        ([], "an empty list"),
        ("hi", r"a text \('hi'\)"),
        ({}, "an empty object"),
        (3, r"a number \(3\)"),
    ],
)
def test_messages_that_are_no_turns_are_named(turns, found):
    with pytest.raises(RowError, match=f"'messages' is {found}; expected a list of turns") as caught:
        example({"messages": turns}, "messages")
    assert caught.value.reason == "bad-messages"


def test_a_turn_that_is_no_object_is_named():
    with pytest.raises(RowError, match=r"turn 2 of 'messages' is a text \('hello'\)"):
        messages(HI, "hello")


# reliability: 37
@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("asistant", r"unknown role 'asistant'\. Did you mean 'assistant'\?"),
        ("\x1b[31m", r"unknown role '\\x1b\[31m'"),
        (None, "turn 2 has no role"),
        (["user"], "unknown role"),
    ],
)
def test_an_unknown_role_is_named_with_the_nearest(role, message):
    with pytest.raises(RowError, match=message) as caught:
        messages(HI, HELLO | {"role": role})
    assert caught.value.reason == "unknown-role"


# Tools


@pytest.mark.parametrize(
    "tools",
    ['[{"name": "f"}]', [{"name": "f"}], [{"type": "function", "function": {"name": "f"}}]],
)
def test_tools_take_one_shape(tools):
    made = example({"conversations": [HI, HELLO], "tools": tools}, "sharegpt")
    assert made["tools"] == [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize("tools", ["", " ", "[]", None, []])
def test_no_tools_leave_no_trace(tools):
    assert "tools" not in example({"conversations": [HI, HELLO], "tools": tools}, "sharegpt")


@pytest.mark.parametrize(
    ("tools", "message"), [("[{", "not valid JSON"), ("{}x", "not valid JSON"), ('["f"]', "a list")]
)
def test_bad_tools_are_named(tools, message):
    with pytest.raises(RowError, match=f"'tools' is {message}") as caught:
        example({"messages": [HI, HELLO], "tools": tools}, "messages")
    assert caught.value.reason == "bad-tools"


# The policy on turns

POLICY = {
    "ua": None,
    "sua": None,
    "dua": None,
    "uua": None,
    "uaa": None,
    "utta": None,
    "au": "assistant-first",
    "aua": "assistant-first",
    "sa": "assistant-first",
    "ta": "assistant-first",
    "usa": "system-not-first",
    "ssua": "system-not-first",
    "sdua": "system-not-first",
    "u": "no-assistant",
    "s": "no-assistant",
    "su": "no-assistant",
    "uau": "ends-with-user",
    "uat": "ends-with-user",
}


# reliability: 37
@pytest.mark.parametrize(("roles", "reason"), POLICY.items())
def test_the_policy_on_turns(roles, reason):
    names = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}
    turns = [{"role": names[letter], "content": "x"} for letter in roles]
    if reason is None:
        assert messages(*turns) == turns
        return
    with pytest.raises(RowError, match=r"a\.jsonl:7: .*[A-Z]\w+ .*\.$") as caught:
        messages(*turns)
    assert caught.value.reason == reason


# reliability: 37
def test_an_empty_answer_is_an_error_unless_it_is_not_trained():
    with pytest.raises(RowError, match="the assistant's turn 2 is empty") as caught:
        messages(HI, HELLO | {"content": " "}, HI, HELLO)
    assert caught.value.reason == "empty-answer"
    assert len(messages(HI, HELLO | {"content": "", "train": False}, HI, HELLO)) == 4


def test_empty_user_and_system_turns_are_kept():
    turns = [SYSTEM | {"content": ""}, HI | {"content": ""}, HELLO]
    assert messages(*turns) == turns


def test_the_system_prompt_goes_to_conversations_that_have_none():
    assert messages(HI, HELLO, system_prompt="Be brief.") == [SYSTEM, HI, HELLO]
    assert messages(SYSTEM | {"content": ""}, HI, HELLO, system_prompt="Be brief.")[0]["content"] == ""
    pair = example({"prompt": [HI], "completion": [HELLO]}, "prompt-completion", system_prompt="Be brief.")
    assert pair == {"prompt": [SYSTEM, HI], "completion": [HELLO]}
    assert example({"text": "x"}, "text", system_prompt="Be brief.") == {"text": "x"}


# Prompt and completion, text


@pytest.mark.parametrize(
    ("prompt", "completion", "reason"),
    [
        ("a", "", "empty-answer"),
        (" ", "b", "empty-prompt"),
        ("a", [HELLO], "bad-content"),
        ([HI], "b", "bad-content"),
        ("a", None, "bad-content"),
        (None, None, "bad-messages"),
        ([], [HELLO], "bad-messages"),
        ([HI], [], "bad-messages"),
        ([HI, HELLO], [HI], "no-assistant"),
        ([HELLO], [HELLO], "assistant-first"),
        ([HI], [HELLO, HI], "ends-with-user"),
        ([HI], [HELLO | {"content": ""}], "empty-answer"),
    ],
)
def test_a_pair_that_cannot_be_used_has_a_reason(prompt, completion, reason):
    with pytest.raises(RowError) as caught:
        example({"prompt": prompt, "completion": completion}, "prompt-completion")
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("text", "reason"), [("", "empty-text"), ("\n", "empty-text"), (None, "bad-content"), (3, "bad-content")]
)
def test_a_text_that_cannot_be_used_has_a_reason(text, reason):
    with pytest.raises(RowError) as caught:
        example({"text": text}, "text")
    assert caught.value.reason == reason


def test_rows_with_images_are_not_trained_on_as_text():
    with pytest.raises(RowError, match="the row has images; only text is trained on") as caught:
        example({"messages": [HI, HELLO], "images": ["a.jpg"]}, "messages")
    assert caught.value.reason == "not-text"
    assert example({"messages": [HI, HELLO], "images": []}, "messages")


# Columns


def test_columns_rename_before_the_format_reads():
    value = {"question": "Add.", "output": "wrong", "answer": "4"}
    columns = {"instruction": "question", "output": "answer"}
    assert [turn["content"] for turn in example(value, "alpaca", columns=columns)["messages"]] == ["Add.", "4"]
    assert detect_format(rows(value), columns) == "alpaca"


def test_columns_that_name_an_absent_column_say_so():
    with pytest.raises(
        RowError, match=r"columns reads 'text' from 'boby', but the row has body\. Did you mean 'body'\?"
    ):
        example({"body": "x"}, "text", columns={"text": "boby"})


def test_columns_that_the_format_does_not_read_are_an_error():
    with pytest.raises(
        ConfigError, match=r"format alpaca reads no 'outptu'\. Did you mean 'output'\? It reads instruction,"
    ):
        example(ALPACA, "alpaca", columns={"outptu": "answer"})


def test_an_unknown_format_is_a_config_error():
    with pytest.raises(ConfigError, match=r"unknown format 'alpcaa'\. Did you mean 'alpaca'"):
        example(ALPACA, "alpcaa")


# A person's own format


def test_a_function_of_ones_own_is_a_format(tmp_path):
    (tmp_path / "mine.py").write_text("def read(row):\n    return {'prompt': row['q'], 'completion': row['a']}\n")
    assert example({"q": "x", "a": "y"}, f"{tmp_path}/mine.py:read") == {"prompt": "x", "completion": "y"}
    with pytest.raises(RowError, match=r"a\.jsonl:7: format '.*' failed with KeyError: 'a'") as caught:
        example({"q": "x"}, f"{tmp_path}/mine.py:read")
    assert caught.value.reason == "format-failed"


def test_what_ones_own_format_returns_is_checked(tmp_path):
    (tmp_path / "mine.py").write_text("def nothing(row): ...\ndef bad(row):\n    return {'messages': [row]}\n")
    with pytest.raises(RowError, match="returned None; expected a dict with text"):
        example({}, f"{tmp_path}/mine.py:nothing")
    with pytest.raises(RowError, match="there is no assistant turn"):
        example(HI, f"{tmp_path}/mine.py:bad")


# The same example twice


# reliability: 46
def test_duplicates_and_overlap_are_counted_wherever_rows_came_from():
    first, again, other = (normalize(row, "text") for row in rows({"text": "x"}, {"text": "x"}, {"text": "y"}))
    assert count_duplicates([first, again, other]) == 1
    assert find_overlap([first, other], [again]) == 1
    assert find_overlap([other], [first, again]) == 0


# Real data and speed


@pytest.mark.parametrize(
    ("name", "format", "num_rows"),
    [
        ("alpaca_en_demo.json", "alpaca", 999),
        ("alpaca_zh_demo.json", "alpaca", 1000),
        ("identity.json", "alpaca", 91),
        ("glaive_toolcall_en_demo.json", "sharegpt", 300),
        ("v1_sft_demo.jsonl", "messages", 500),
        ("c4_demo.jsonl", "text", 300),
        ("wiki_demo.txt", "text", 9),
    ],
)
def test_real_datasets_normalize_without_errors(name, format, num_rows):
    if not (REAL / name).is_file():
        pytest.skip(f"{name} is not in ../shared/data")
    found = load(REAL / name)
    assert detect_format(found) == format
    examples = [normalize(row, format) for row in found]
    assert len(examples) == num_rows


def test_rows_normalize_in_microseconds():
    many = rows(*[{"messages": [SYSTEM, HI, HELLO, HI, HELLO | {"weight": 1.0}]}] * 5000)
    start = time.perf_counter()
    for row in many:
        normalize(row, "messages")
    assert (time.perf_counter() - start) / len(many) < 100e-6  # about 5 µs; the limit allows for a busy machine
