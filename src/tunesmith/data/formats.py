"""FORMATS: the shapes that rows come in, and how each is read as one text, a conversation, or a prompt and completion.

A reader moves columns to where they belong; whether what it finds can be trained on is for normalize.py to say.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tunesmith.data.report import visible
from tunesmith.data.rows import RowError
from tunesmith.lookup import did_you_mean

INSTRUCTING = ("system", "developer")
OF_CHATS = ("tools", "chat_template_kwargs")  # columns that any conversation may have


class Format(NamedTuple):
    """How rows of one shape are told apart and read."""

    columns: tuple[str, ...]
    """The columns that identify it."""
    optional: tuple[str, ...]
    """Further columns that it reads."""
    read: Callable[[dict[str, Any]], dict[str, Any]]
    """Row → Example without its place; what it returns is checked by `normalize`."""
    doc: str


def read_alpaca(value: dict[str, Any]) -> dict[str, Any]:
    """Instruction and input are one user turn, a line apart; `history` holds earlier pairs of turns, oldest first."""
    question = "\n".join(part for part in (_string(value, "instruction"), _string(value, "input", "")) if part)
    answer = _string(value, "output")
    if not question.strip():
        raise RowError("'instruction' and 'input' are both empty. Write what the answer answers.", "empty-prompt")
    messages: list[dict[str, Any]] = []
    for pair in value.get("history") or ():
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(turn, str) for turn in pair)):
            what = visible(repr(pair), 60)
            raise RowError(f"'history' holds {what}; expected pairs [question, answer] of texts.", "bad-history")
        messages += ({"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]})
    messages += ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return {"messages": _with_system_column(messages, value), **_of_chat(value)}


def read_sharegpt(value: dict[str, Any]) -> dict[str, Any]:
    """Turns under `conversations`, as from/value or role/content; `system` and `tools` columns."""
    return _conversation(value, "conversations")


def read_messages(value: dict[str, Any]) -> dict[str, Any]:
    """Turns under `messages`, in the same shapes; content is a text or a list of text parts."""
    return _conversation(value, "messages")


def _conversation(value: dict[str, Any], name: str) -> dict[str, Any]:
    turns = [_as_role_and_content(turn) for turn in turns_of(column(value, name), name)]
    return {"messages": _with_system_column(turns, value), **_of_chat(value)}


def _of_chat(value: dict[str, Any]) -> dict[str, Any]:
    return {name: value[name] for name in OF_CHATS if value.get(name) is not None}


def _as_role_and_content(turn: dict[str, Any]) -> dict[str, Any]:
    """ShareGPT's from/value renamed, and the JSON of a function call as the call that it is."""
    if "from" in turn and turn.get("role") is None:
        turn = {
            {"from": "role", "value": "content"}.get(key, key): item for key, item in turn.items() if item is not None
        }
    if turn.get("role") == "function_call" and (calls := _tool_calls(turn.get("content"))):
        turn = {**turn, "content": "", "tool_calls": calls}
    return turn


def _tool_calls(content: Any) -> list[dict[str, Any]] | None:
    """Calls in the shape templates read, from the JSON text of one call or a list of calls; None if it is neither."""
    try:
        calls = json.loads(content)
    except (TypeError, ValueError, RecursionError):
        return None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        return None
    return [{"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in calls]


def read_prompt_completion(value: dict[str, Any]) -> dict[str, Any]:
    """Both texts, or both lists of turns."""
    prompt, completion = column(value, "prompt"), column(value, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": prompt, "completion": completion, **_of_chat(value)}
    if isinstance(prompt, str) or isinstance(completion, str):
        text, other = ("prompt", "completion") if isinstance(prompt, str) else ("completion", "prompt")
        found = kind_of(value[other])
        raise RowError(
            f"'{text}' is a text but '{other}' is {found}; both must be texts or both turns.", "bad-content"
        )
    return {"prompt": prompt, "completion": completion, **_of_chat(value)}


def read_text(value: dict[str, Any]) -> dict[str, Any]:
    """Plain text, all of it trained."""
    return {"text": column(value, "text")}


# Where a row has the columns of several formats, the first that fits is taken.
FORMATS: dict[str, Format] = {
    "messages": Format(
        ("messages",), ("system", *OF_CHATS), read_messages, "turns as role and content, as in OpenAI's files"
    ),
    "sharegpt": Format(
        ("conversations",), ("system", *OF_CHATS), read_sharegpt, "turns as from and value: human, gpt, system, ..."
    ),
    "alpaca": Format(
        ("instruction", "output"),
        ("input", "system", "history", *OF_CHATS),
        read_alpaca,
        "instruction, optional input, output",
    ),
    "prompt-completion": Format(
        ("prompt", "completion"), OF_CHATS, read_prompt_completion, "a prompt and what follows it"
    ),
    "text": Format(("text",), (), read_text, "plain text"),
}


# Columns and turns -------------------------------------------------------------------------------------------------


def renamed(value: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under our column names; a column that is absent stays so and is reported by whoever needs it."""
    taken = set(columns.values())
    kept = {key: item for key, item in value.items() if key not in taken and key not in columns}
    return kept | {ours: value[theirs] for ours, theirs in columns.items() if theirs in value}


def column(value: Mapping[str, Any], name: str) -> Any:
    """A column that must be there, or a RowError with those that are and the nearest."""
    if name not in value:
        what = f"there is no column '{name}'; the row has {columns_of(value)}.{did_you_mean(name, map(str, value))}"
        raise RowError(f"{what} Name the right one in columns: {{{name}: ...}}.", "missing-column")
    return value[name]


def _string(value: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """A column that holds a text; an optional one may be absent or null."""
    found = column(value, name) if default is None else value.get(name)
    if found is None and default is not None:
        return default
    if not isinstance(found, str):
        raise RowError(
            f"'{name}' is {kind_of(found)}, not a text. Put it in quotes or leave the row out.", "bad-content"
        )
    return found


def _with_system_column(messages: list[dict[str, Any]], value: Mapping[str, Any]) -> list[dict[str, Any]]:
    system = _string(value, "system", "")
    if not system:
        return messages
    first = messages[0]
    if first.get("role") in INSTRUCTING:
        if first.get("content") != system:
            raise RowError("a 'system' column and a system turn that differ. Keep one of them.", "two-systems")
        return messages
    return [{"role": "system", "content": system}, *messages]


def turns_of(turns: Any, name: str) -> list[dict[str, Any]]:
    """What should be turns as a list of dicts; whether the turns are good is not asked."""
    if not isinstance(turns, (list, tuple)) or not turns:
        raise RowError(f"'{name}' is {kind_of(turns)}; expected a list of turns.", "bad-messages")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            what = f"turn {number} of '{name}' is {kind_of(turn)}"
            raise RowError(f"{what}; expected an object with role and content.", "bad-messages")
    return list(turns)


def columns_of(value: Mapping[str, Any]) -> str:
    """The names of a row's columns, for an error."""
    return ", ".join(visible(str(key), 40) for key in list(value)[:12]) or "none"


def kind_of(value: Any) -> str:
    """What a value is, in words, with a look at it."""
    if value is None:
        return "null"
    if isinstance(value, (list, tuple, dict, str)) and not value:
        return {list: "an empty list", tuple: "an empty list", dict: "an empty object", str: "empty"}[type(value)]
    words = {str: "a text", list: "a list", tuple: "a list", dict: "an object", bool: "true or false"}
    return (
        f"{words.get(type(value), 'a number' if isinstance(value, (int, float)) else type(value).__name__)} "
        f"({visible(repr(value), 40)})"
    )
