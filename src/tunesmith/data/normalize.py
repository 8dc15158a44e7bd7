"""A row of any known format becomes an Example: one text, one conversation, or one prompt with its completion."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from typing import Any, NamedTuple, TypedDict

from tunesmith.data.load import Row, RowError
from tunesmith.data.report import place, visible
from tunesmith.errors import ConfigError, DataError
from tunesmith.lookup import did_you_mean, lookup


class Message(TypedDict, total=False):
    """One turn. Keys not named here (name, tool_call_id, reasoning_content, ...) reach the template as they are."""

    role: str
    """system, developer, user, assistant or tool."""
    content: str
    tool_calls: list[dict[str, Any]]
    train: bool
    """Whether the loss covers the turn, in place of what `train_on` says."""
    weight: float
    """What the turn's loss is multiplied by."""


class Example(TypedDict, total=False):
    """What a row means: `text`, or `messages`, or `prompt` and `completion` (both strings or both turns)."""

    text: str
    messages: list[Message]
    tools: list[dict[str, Any]]
    """Functions the assistant may call; with turns only."""
    prompt: str | list[Message]
    completion: str | list[Message]
    source: str
    line: int


class Format(NamedTuple):
    """How rows of one shape are told apart and read."""

    columns: tuple[str, ...]
    """The columns that identify it."""
    optional: tuple[str, ...]
    """Further columns that it reads."""
    read: Callable[[dict[str, Any]], dict[str, Any]]
    """Row → Example without its place; what it returns is checked by `normalize`."""
    doc: str


# Role as written → role as templates know it.
ROLES: dict[str, str] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
INSTRUCTING = ("system", "developer")
MEDIA = ("images", "videos", "audios")
# Names that other data gives to our columns, for suggestions only.
NICKNAMES: dict[str, tuple[str, ...]] = {
    "instruction": ("question", "query", "prompt", "user"),
    "output": ("answer", "response", "completion", "target", "assistant"),
    "prompt": ("question", "query", "instruction", "source", "user"),
    "completion": ("answer", "response", "output", "target", "assistant"),
    "messages": ("conversation", "conversations", "dialog", "dialogue", "chat", "turns"),
    "conversations": ("conversation",),
    "text": ("content", "document", "body"),
}


def normalize(
    row: Row,
    format: str,
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
) -> Example:
    """Read one row as `format` says, check it, and note where it came from.

    Args:
        row: what `load_rows` gave.
        format: name in `FORMATS`, or `file.py:function` whose function takes the row's dict and returns an Example.
        columns: our column name → the row's.
        system_prompt: system turn for a conversation that has none; texts and string prompts are no conversations.

    Raises: RowError with the place, the reason and the way to mend it; ConfigError for an unknown format.
    """
    try:
        value = _renamed_for(format, row.value, columns) if columns else row.value
        example = _checked(_reader(format)(value), system_prompt)
        _no_media(row.value)
    except RowError as error:
        raise error.at(row.source, row.line) from None
    example["source"], example["line"] = row.source, row.line
    return example


def renamed(value: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under our column names; a column that is absent stays so and is reported by whoever needs it."""
    taken = set(columns.values())
    kept = {key: item for key, item in value.items() if key not in taken and key not in columns}
    return kept | {ours: value[theirs] for ours, theirs in columns.items() if theirs in value}


def _renamed_for(format: str, value: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """`renamed`, after a check that `columns` names what the format reads and what the row has."""
    if format in FORMATS:
        known = (*FORMATS[format].columns, *FORMATS[format].optional)
        for ours, theirs in columns.items():
            if ours not in known:
                hint = did_you_mean(ours, known)
                raise ConfigError(f"columns: format {format} reads no '{ours}'.{hint} It reads {', '.join(known)}.")
            if ours in FORMATS[format].columns and theirs not in value:
                what = f"columns reads '{ours}' from '{theirs}', but the row has {_present(value)}"
                raise RowError(f"{what}.{did_you_mean(theirs, map(str, value))} Mend columns.", "missing-column")
    return renamed(value, columns)


def _reader(format: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return FORMATS[format].read if format in FORMATS else _own_reader(format)


@cache  # a file is executed once, not once per row
def _own_reader(format: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    function = lookup(FORMATS, format, "format")

    def read(value: dict[str, Any]) -> dict[str, Any]:
        try:
            example = function(value)
        except RowError:
            raise
        except Exception as error:
            what = visible(f"{type(error).__name__}: {error}", 120)
            raise RowError(
                f"format '{format}' failed with {what}. Mend the function or the row.", "format-failed"
            ) from error
        if not isinstance(example, dict) or not example.keys() & {"text", "messages", "prompt"}:
            raise RowError(
                f"format '{format}' returned {visible(repr(example), 60)}; expected a dict with text, messages, or "
                "prompt and completion.",
                "format-failed",
            )
        return example

    return read


# Formats -----------------------------------------------------------------------------------------------------------


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
    return {"messages": _with_system_column(messages, value), "tools": value.get("tools")}


def read_sharegpt(value: dict[str, Any]) -> dict[str, Any]:
    """Turns under `conversations`, as from/value or role/content; `system` and `tools` columns."""
    return _conversation(value, "conversations")


def read_messages(value: dict[str, Any]) -> dict[str, Any]:
    """Turns under `messages`, in the same shapes; content is a text or a list of text parts."""
    return _conversation(value, "messages")


def _conversation(value: dict[str, Any], name: str) -> dict[str, Any]:
    turns = [_as_role_and_content(turn) for turn in _turns(_column(value, name), name)]
    return {"messages": _with_system_column(turns, value), "tools": value.get("tools")}


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
    prompt, completion = _column(value, "prompt"), _column(value, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": prompt, "completion": completion}
    if isinstance(prompt, str) or isinstance(completion, str):
        text, other = ("prompt", "completion") if isinstance(prompt, str) else ("completion", "prompt")
        found = _kind(value[other])
        raise RowError(
            f"'{text}' is a text but '{other}' is {found}; both must be texts or both turns.", "bad-content"
        )
    return {"prompt": prompt, "completion": completion, "tools": value.get("tools")}


def read_text(value: dict[str, Any]) -> dict[str, Any]:
    """Plain text, all of it trained."""
    return {"text": _column(value, "text")}


# Where a row has the columns of several formats, the first that fits is taken.
FORMATS: dict[str, Format] = {
    "messages": Format(
        ("messages",), ("tools", "system"), read_messages, "turns as role and content, as in OpenAI's files"
    ),
    "sharegpt": Format(
        ("conversations",), ("tools", "system"), read_sharegpt, "turns as from and value: human, gpt, system, ..."
    ),
    "alpaca": Format(
        ("instruction", "output"),
        ("input", "system", "history", "tools"),
        read_alpaca,
        "instruction, optional input, output",
    ),
    "prompt-completion": Format(
        ("prompt", "completion"), ("tools",), read_prompt_completion, "a prompt and what follows it"
    ),
    "text": Format(("text",), (), read_text, "plain text"),
}


def _column(value: Mapping[str, Any], name: str) -> Any:
    if name not in value:
        what = f"there is no column '{name}'; the row has {_present(value)}.{did_you_mean(name, map(str, value))}"
        raise RowError(f"{what} Name the right one in columns: {{{name}: ...}}.", "missing-column")
    return value[name]


def _present(value: Mapping[str, Any]) -> str:
    return ", ".join(visible(str(key), 40) for key in list(value)[:12]) or "none"


def _string(value: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """A column that holds a text; an optional one may be absent or null."""
    found = _column(value, name) if default is None else value.get(name)
    if found is None and default is not None:
        return default
    if not isinstance(found, str):
        raise RowError(
            f"'{name}' is {_kind(found)}, not a text. Put it in quotes or leave the row out.", "bad-content"
        )
    return found


def _turns(turns: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(turns, (list, tuple)) or not turns:
        raise RowError(f"'{name}' is {_kind(turns)}; expected a list of turns.", "bad-messages")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            what = f"turn {number} of '{name}' is {_kind(turn)}"
            raise RowError(f"{what}; expected an object with role and content.", "bad-messages")
    return list(turns)


def _kind(value: Any) -> str:
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


# Checks ------------------------------------------------------------------------------------------------------------


def _checked(example: Mapping[str, Any], system_prompt: str | None) -> Example:
    """The example with every turn in one shape, or a RowError that says what about it cannot be trained on."""
    if "text" in example:
        return {"text": _filled(example["text"], "text", "empty-text")}
    if "messages" in example:
        messages = [_message(turn, n) for n, turn in enumerate(_turns(example["messages"], "messages"), 1)]
        messages = _with_system_prompt(messages, system_prompt)
        check_turns(messages)
        return _with_tools({"messages": messages}, example.get("tools"))
    prompt, completion = _column(example, "prompt"), _column(example, "completion")
    if isinstance(prompt, str):
        prompt = _filled(prompt, "prompt", "empty-prompt")
        return {"prompt": prompt, "completion": _filled(completion, "completion", "empty-answer")}
    before = [_message(turn, n) for n, turn in enumerate(_turns(prompt, "prompt"), 1)]
    before = _with_system_prompt(before, system_prompt)
    after = [_message(turn, n) for n, turn in enumerate(_turns(completion, "completion"), 1)]
    check_turns([*before, *after], last=len(after))
    return _with_tools({"prompt": before, "completion": after}, example.get("tools"))


def _filled(text: Any, name: str, reason: str) -> str:
    if not isinstance(text, str):
        raise RowError(f"'{name}' is {_kind(text)}, not a text. Put it in quotes or leave the row out.", "bad-content")
    if not text.strip():
        raise RowError(f"'{name}' is empty. Fill it or leave the row out.", reason)
    return text


def _message(turn: Mapping[str, Any], number: int) -> Message:
    """One turn with a known role and a text; keys that are null (as Parquet fills them) are left away."""
    role = turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        known = "" if role is None else did_you_mean(str(role), ROLES)
        what = "has no role" if role is None else f"has the unknown role '{visible(str(role), 40)}'"
        raise RowError(f"turn {number} {what}.{known} Known: {', '.join(ROLES)}.", "unknown-role")
    message: Message = {"role": ROLES[role], "content": ""}
    content = turn.get("content")
    if isinstance(content, str):
        message["content"] = content
    elif content is not None or not turn.get("tool_calls"):
        message["content"] = _joined(content, "content" in turn, number)
    if len(turn) > 2:
        _other_keys(turn, message, number)
    return message


def _joined(content: Any, is_given: bool, number: int) -> str:
    """The text of content parts such as `{"type": "text", "text": "..."}`."""
    if not isinstance(content, (list, tuple)):
        what = f"turn {number} has no content" if not is_given else f"the content of turn {number} is {_kind(content)}"
        raise RowError(f"{what}; expected a text. Write one, or leave the row out.", "bad-content")
    texts = []
    for part in content:
        type_ = part.get("type") if isinstance(part, dict) else None
        text = (part.get("text") if part.get("text") is not None else part.get("value")) if type_ == "text" else None
        if not isinstance(text, str):
            what = (
                f"a part of type '{visible(str(type_), 30)}'"
                if type_ not in (None, "text")
                else visible(repr(part), 60)
            )
            raise RowError(f"turn {number} holds {what}; only text is trained on. Leave the row out.", "not-text")
        texts.append(text)
    return "".join(texts)


def _other_keys(turn: Mapping[str, Any], message: Message, number: int) -> None:
    for key, item in turn.items():
        if key in ("role", "content") or item is None:
            continue
        if key == "train" and not isinstance(item, bool):
            what = f"'train' of turn {number} is {_kind(item)}"
            raise RowError(f"{what}; expected true or false (a number is a weight).", "bad-weight")
        if key in ("weight", "loss_weight"):
            is_number = isinstance(item, (int, float)) and not isinstance(item, bool)
            if not is_number or not 0 <= item < math.inf:
                raise RowError(
                    f"'{key}' of turn {number} is {_kind(item)}; expected a number from 0 on.", "bad-weight"
                )
            key, item = "weight", float(item)
        if key == "tool_calls" and not item:
            continue
        message[key] = item


def _with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    if not system_prompt or messages[0]["role"] in INSTRUCTING:
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def check_turns(messages: Sequence[Message], last: int | None = None) -> None:
    """The policy on the order of turns; `last` is how many at the end are the completion.

        two user turns in a row      kept as they are
        empty user or system turn    kept as it is
        system after the first turn  system-not-first
        anything before a user turn  assistant-first
        no assistant turn            no-assistant
        last turn not the assistant  ends-with-user
        assistant says nothing       empty-answer, unless it calls a tool or is marked `train: false`

    Raises: RowError whose reason is the word on the right.
    """
    roles = [message["role"] for message in messages]
    for number, role in enumerate(roles[1:], 2):
        if role in INSTRUCTING:
            raise RowError(
                f"turn {number} is a {role} turn; it may only come first. Move or remove it.", "system-not-first"
            )
    turns = roles[1:] if roles[0] in INSTRUCTING else roles
    if "assistant" not in (roles[-last:] if last else turns):
        raise RowError("there is no assistant turn, so nothing is trained. Add the answer.", "no-assistant")
    if turns[0] != "user":
        raise RowError(
            f"the first turn is the {turns[0]}'s, which answers nothing. Put the user turn before it.",
            "assistant-first",
        )
    if roles[-1] != "assistant":
        raise RowError(
            f"the last turn is the {roles[-1]}'s, which no answer follows. Drop it, or add the assistant's reply.",
            "ends-with-user",
        )
    for number, message in enumerate(messages, 1):
        says_nothing = not message["content"].strip() and not message.get("tool_calls")
        if message["role"] == "assistant" and says_nothing and message.get("train", True):
            raise RowError(f"the assistant's turn {number} is empty. Write the answer.", "empty-answer")


def _with_tools(example: Example, tools: Any) -> Example:
    """Tools as a list of `{"type": "function", "function": {...}}`, read from a list or from its JSON text."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise RowError(f"'tools' is not valid JSON ({visible(str(error), 60)}). Mend it.", "bad-tools") from None
    if not tools:
        return example
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"'tools' is {_kind(tools)}; expected a list of functions.", "bad-tools")
    example["tools"] = [tool if "name" not in tool else {"type": "function", "function": tool} for tool in tools]
    return example


def _no_media(value: Mapping[str, Any]) -> None:
    for name in MEDIA:
        if value.get(name):
            raise RowError(
                f"the row has {name}; only text is trained on. Leave the row or the column out.", "not-text"
            )


# Detection ---------------------------------------------------------------------------------------------------------


def detect_format(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> str:
    """The name of the format whose columns the rows have; `columns` as in `normalize`.

    A row that has the columns of no format does not change the answer: `normalize` says what it lacks.

    Raises: DataError if rows have different formats, or no row has the columns of any.
    """
    seen: dict[str, Row] = {}
    names: dict[tuple[str, ...], str | None] = {}
    for row in rows:
        keys = tuple(row.value)
        if keys not in names:
            names[keys] = _format_of(renamed(row.value, columns) if columns else row.value)
            if (name := names[keys]) is not None:
                seen.setdefault(name, row)
    if len(seen) > 1:
        (one, row), (other, other_row) = list(seen.items())[:2]
        raise DataError(
            f"the rows have different formats: {place(row.source, row.line)} is {one}, "
            f"{place(other_row.source, other_row.line)} is {other}. Train on one format at a time, or convert one."
        )
    if not seen:
        raise DataError(_no_format(rows[0], columns) if rows else "there are no rows to detect a format from.")
    return next(iter(seen))


def describe_format(format: str, row: Row, columns: Mapping[str, str] | None = None) -> str:
    """A line for the report: the format, the columns of `row` that it reads, and those that it does not.

    >>> describe_format("text", Row({"text": "a", "id": 1}, "a.jsonl", 1))
    'format: text (column text; not read: id)'
    """
    present = list(renamed(row.value, columns) if columns else row.value)
    if format not in FORMATS:
        return f"format: {visible(format)}"
    known = (*FORMATS[format].columns, *FORMATS[format].optional)
    read = [name for name in present if name in known]
    rest = [name for name in present if name not in known]
    unread = f"; not read: {_names(rest[:12])}" if rest else ""
    return f"format: {format} ({'column' if len(read) == 1 else 'columns'} {_names(read)}{unread})"


def _format_of(value: Mapping[str, Any]) -> str | None:
    if {"chosen", "rejected"} <= value.keys():
        return None
    return next((name for name, format in FORMATS.items() if all(c in value for c in format.columns)), None)


def _no_format(row: Row, columns: Mapping[str, str] | None) -> str:
    value = renamed(row.value, columns) if columns else row.value
    present = [str(key) for key in value]
    found = f"{place(row.source, row.line)}: no known format has the columns {_names(present[:12])}"
    choose = f"set format: to one of {_names(FORMATS)} or to file.py:function"
    if {"chosen", "rejected"} <= value.keys():
        return f"{found}: these are preference pairs, and stage sft trains on single answers. To use a part, {choose}."
    if not any(_guess(ours, present) for format in FORMATS.values() for ours in format.columns):
        known = "; ".join(f"{name} ({_names(format.columns)})" for name, format in FORMATS.items())
        return f"{found}. Known: {known}. Name yours in columns: {{prompt: ..., completion: ...}}, or {choose}."
    nearest = max(FORMATS, key=lambda name: _nearness(FORMATS[name], present))
    guesses = {ours: _guess(ours, present) for ours in FORMATS[nearest].columns if ours not in present}
    renames = ", ".join(f"{ours}: {visible(theirs or '...', 40)}" for ours, theirs in guesses.items())
    wanted = _names(FORMATS[nearest].columns)
    hint = "".join(did_you_mean(theirs, [ours]) for ours, theirs in guesses.items() if theirs)
    return f"{found}. The closest is {nearest} ({wanted}).{hint} Set columns: {{{renames}}}, or {choose}."


def _names(names: Iterable[str]) -> str:
    return ", ".join(visible(name, 40) for name in names)


def _nearness(format: Format, present: Sequence[str]) -> float:
    return sum(_similarity(ours, _guess(ours, present)) for ours in format.columns) / len(format.columns)


def _guess(ours: str, present: Sequence[str]) -> str | None:
    """The column that most likely is ours, if any comes near."""
    best = max(present, key=lambda theirs: _similarity(ours, theirs), default=None)
    return best if best is not None and _similarity(ours, best) >= 0.6 else None


def _similarity(ours: str, theirs: str | None) -> float:
    if theirs is None:
        return 0.0
    if theirs.lower() in NICKNAMES.get(ours, ()):
        return 0.8
    return SequenceMatcher(None, ours, theirs.lower()).ratio()


# The same example twice ----------------------------------------------------------------------------------------------


def count_duplicates(examples: Iterable[Example]) -> int:
    """Examples that repeat an earlier one, wherever they came from."""
    keys = [_content(example) for example in examples]
    return len(keys) - len(set(keys))


def find_overlap(train: Iterable[Example], held_out: Iterable[Example]) -> int:
    """Held-out examples that are also trained on, which makes the evaluation look better than it is."""
    trained = {_content(example) for example in train}
    return sum(_content(example) in trained for example in held_out)


def _content(example: Example) -> int:
    own = {key: item for key, item in example.items() if key not in ("source", "line")}
    return hash(json.dumps(own, sort_keys=True, default=str))
