"""Turns and rows that the tests of formats, detection and normalizing share."""

from tunesmith.data.normalize import normalize
from tunesmith.data.rows import Row

ALPACA = {"instruction": "Add.", "input": "2+2", "output": "4"}
HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def example(value, format, **options):
    made = normalize(Row(value, "a.jsonl", 7), format, **options)
    assert (made.pop("source"), made.pop("line")) == ("a.jsonl", 7)
    return made


def messages(*turns, **options):
    return example({"messages": list(turns)}, "messages", **options)["messages"]


def rows(*values):
    return [Row(value, "a.jsonl", line) for line, value in enumerate(values, 1)]
