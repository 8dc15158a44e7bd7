"""Which format rows have, and what to do where they have none."""

import pytest

from tests.data.examples import ALPACA, HELLO, HI, rows
from tunesmith.data.detect import describe_format, detect_format
from tunesmith.data.rows import Row
from tunesmith.errors import DataError


def test_of_several_formats_the_first_in_the_table_is_taken():
    assert detect_format(rows(ALPACA | {"text": "both"})) == "alpaca"
    assert detect_format(rows({"prompt": "x", "completion": "y", "messages": [HI, HELLO]})) == "messages"


# reliability: 38
def test_mixed_formats_are_named_with_two_lines():
    with pytest.raises(DataError, match=r"different formats: a\.jsonl:1 is text, a\.jsonl:3 is alpaca\."):
        detect_format(rows({"text": "x"}, {"text": "y"}, ALPACA))


def test_a_row_without_a_format_is_left_to_normalize():
    assert detect_format(rows({"txet": "x"}, {"text": "y"})) == "text"


# reliability: 35
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"mesages": []},
            r"mesages\. The closest is messages .*Did you mean 'messages'.*{messages: mesages}",
        ),
        (
            {"instrution": "", "output": ""},
            r".*closest is alpaca .*Set columns: {instruction: instrution}, or set format:",
        ),
        ({"question": "", "answer": ""}, r".*Set columns: {\w+: question, \w+: answer}"),
        ({"input": "", "target": ""}, r".*Set columns: {\w+: input, \w+: target}"),
        (
            {"version": 1, "data": [{"question": "a", "answer": "b"}] * 2},
            r"version, data, and data holds a list of 2 objects\. .* jq '\.\[\"data\"\]' a\.jsonl > rows\.json",
        ),
        ({"foo": "", "bar": ""}, r"foo, bar\. Known: messages \(messages\); .*file\.py:function"),
        ({}, r"none\. Known: "),
        ({"prompt": "", "chosen": "", "rejected": ""}, r".*preference pairs, and stage sft"),
    ],
)
def test_rows_of_no_format_are_named_with_the_closest_one(value, message):
    with pytest.raises(DataError, match=rf"^a\.jsonl:1: no known format has the columns {message}"):
        detect_format(rows(value))


def test_the_format_is_described_with_what_it_reads_and_what_not():
    described = describe_format("alpaca", Row(ALPACA | {"id": 3, "\x1b": 1}, "a.json", 1))
    assert described == "format: alpaca (columns instruction, input, output; not read: id, \\x1b)"


def test_a_null_column_is_as_good_as_none():
    assert detect_format(rows({"messages": None, "text": "x"}, {"messages": None, "text": "y"})) == "text"
    assert detect_format(rows({"messages": [HI, HELLO], "text": None})) == "messages"


def test_a_pair_that_is_a_conversation_too_trains_stage_sft_on_that():
    pair = {"prompt": "hi", "chosen": [HI, HELLO], "rejected": [HI, HELLO]}
    assert detect_format(rows(pair | {"messages": [HI, HELLO]})) == "messages"
    with pytest.raises(DataError, match="preference pairs"):
        detect_format(rows(pair | {"messages": [HI]}))  # the prompt of the answers


@pytest.mark.parametrize(
    ("change", "said"), [({"chosen": None}, "chosen holds"), ({"chosen": None, "rejected": None}, "rejected hold")]
)
def test_a_pair_whose_answer_is_null_says_so(change, said):
    with pytest.raises(DataError, match=rf"^a\.jsonl:1: stage rm compares two answers, and .*{said} nothing \(null\)"):
        detect_format(rows({"prompt": "p", "chosen": "a", "rejected": "b"} | change), stage="rm")


# workflow: V5
@pytest.mark.parametrize("value", [ALPACA, {"messages": [HI, HELLO]}, {"text": "x"}, {"chosen": "a"}])
def test_rows_of_one_answer_are_not_for_stage_rm(value):
    with pytest.raises(DataError, match=r"^a\.jsonl:1: stage rm compares two answers, and the row has the columns"):
        detect_format(rows(value), stage="rm")
