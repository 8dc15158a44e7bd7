"""A row of any known format becomes an Example: a text, a conversation, or a prompt with its answers."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, TypedDict

from tunesmith.data.formats import (
    FORMATS,
    INSTRUCTING,
    OWN_ARGUMENTS,
    column,
    columns_of,
    kind_of,
    no_text,
    renamed,
    turns_of,
)
from tunesmith.data.report import visible
from tunesmith.data.rows import Row, RowError
from tunesmith.errors import ConfigError
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
    """What a row means.

    `text`, or `messages`, or `prompt` and `completion` (both strings or both turns), or, to compare answers, `prompt`,
    `chosen` and `rejected` (all turns). An example that is only to be answered may have no answer.
    """

    text: str
    messages: list[Message]
    tools: list[dict[str, Any]]
    """Functions the assistant may call; with turns, or strings that become turns."""
    prompt: str | list[Message]
    completion: str | list[Message]
    chosen: list[Message]
    """The better answer, which ends with an assistant turn; the prompt holds what both answers share."""
    rejected: list[Message]
    """The worse answer."""
    chat_template_kwargs: dict[str, Any]
    """Further variables of the chat template, for this row; with turns, or strings that become turns."""
    source: str
    line: int


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
MEDIA = ("images", "videos", "audios")
ALIASES = {"loss": "train", "loss_weight": "weight"}  # keys of a turn, as ms-swift and others write them
TURN_KEYS = {*Message.__annotations__, "name", "tool_call_id", "reasoning_content", "reasoning", "thinking"}
CALLS = ("tool_calls", "function_call")
ANSWERS = ("output", "completion")  # columns that a row without an answer lacks


def normalize(
    row: Row,
    format: str,
    columns: Mapping[str, str] | None = None,
    system_prompt: str | None = None,
    *,
    answers_needed: bool = True,
) -> Example:
    """Read one row as `format` says, check it, and note where it came from.

    Args:
        row: as `data.sources` reads it.
        format: name in `FORMATS`, or `file.py:function` whose function takes the row's dict and returns an Example.
        columns: our column name → the row's.
        system_prompt: system turn for a conversation that has none; texts and string prompts are no conversations.
        answers_needed: a row without an answer is a bad row. Otherwise it is a prompt, as prediction wants it.

    Raises: RowError with the place, the reason and the way to mend it; ConfigError for an unknown format.
    """
    try:
        value = _renamed_for(format, row.value, columns, answers_needed) if columns else row.value
        if not answers_needed:
            value = value | {name: "" for name in _answers_of(format) if value.get(name) is None}
        example = _checked(_reader(format)(value), system_prompt, answers_needed)
        _no_media(row.value)
    except RowError as error:
        raise error.at(row.source, row.line) from None
    example["source"], example["line"] = row.source, row.line
    return example


def _renamed_for(
    format: str, value: Mapping[str, Any], columns: Mapping[str, str], answers_needed: bool
) -> dict[str, Any]:
    """`renamed`, after a check that `columns` names what the format reads and what the row has."""
    if format in FORMATS:
        known = (*FORMATS[format].columns, *FORMATS[format].optional)
        for ours, theirs in columns.items():
            if ours not in known:
                hint = did_you_mean(ours, known)
                raise ConfigError(f"columns: format {format} reads no '{ours}'.{hint} It reads {', '.join(known)}.")
            is_needed = ours in FORMATS[format].columns and (answers_needed or ours not in ANSWERS)
            if is_needed and theirs not in value:
                what = f"columns reads '{ours}' from '{theirs}', but the row has {columns_of(value)}"
                raise RowError(f"{what}.{did_you_mean(theirs, map(str, value))} Mend columns.", "missing-column")
    return renamed(value, columns)


def _answers_of(format: str) -> tuple[str, ...]:
    return tuple(name for name in ANSWERS if format in FORMATS and name in FORMATS[format].columns)


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
                "prompt and completion (or chosen and rejected).",
                "format-failed",
            )
        return example

    return read


# Checks ------------------------------------------------------------------------------------------------------------


def _checked(example: Mapping[str, Any], system_prompt: str | None, answers_needed: bool = True) -> Example:
    """The example with every turn in one shape, or a RowError that says what about it cannot be trained on."""
    if "text" in example:
        return {"text": _filled(example["text"], "text", "empty-text")}
    if "chosen" in example or "rejected" in example:
        return _checked_pair(example, system_prompt)
    if "messages" in example:
        messages = _with_system_prompt(_messages(example["messages"], "messages"), system_prompt)
        messages = messages if answers_needed else _without_blank_end(messages)
        check_turns(messages, answers_needed=answers_needed)
        return _with_template_variables({"messages": messages}, example)
    prompt, completion = column(example, "prompt"), example.get("completion")
    if answers_needed:
        completion = column(example, "completion")
    elif not completion or (isinstance(completion, str) and not completion.strip()):
        return _checked_prompt(example, system_prompt)
    if isinstance(prompt, str):
        prompt = _filled(prompt, "prompt", "empty-prompt")
        texts: Example = {"prompt": prompt, "completion": _filled(completion, "completion", "empty-answer")}
        return _with_template_variables(texts, example)
    before = _with_system_prompt(_messages(prompt, "prompt"), system_prompt)
    after = _messages(completion, "completion")
    check_turns([*before, *after], last=len(after))
    return _with_template_variables({"prompt": before, "completion": after}, example)


def _checked_prompt(example: Mapping[str, Any], system_prompt: str | None) -> Example:
    """A prompt that has no answer."""
    if isinstance(example["prompt"], str):
        found: Example = {"prompt": _filled(example["prompt"], "prompt", "empty-prompt")}
    else:
        found = {"messages": _with_system_prompt(_messages(example["prompt"], "prompt"), system_prompt)}
        check_turns(found["messages"], answers_needed=False)
    return _with_template_variables(found, example)


def _checked_pair(example: Mapping[str, Any], system_prompt: str | None) -> Example:
    """A prompt and two answers that differ, each of them an answer."""
    prompt = _with_system_prompt(_messages(column(example, "prompt"), "prompt"), system_prompt)
    if not any(message["role"] == "user" for message in prompt):
        raise RowError("the prompt has no user turn. Write what the answers answer.", "no-prompt")
    pair = {name: _messages(column(example, name), name) for name in ("chosen", "rejected")}
    for name, answer in pair.items():
        try:
            check_turns([*prompt, *answer], last=len(answer))
        except RowError as error:
            raise RowError(f"'{name}': {error}", error.reason) from None
    if pair["chosen"] == pair["rejected"]:
        raise RowError("'chosen' and 'rejected' are the same, so neither is better. Leave the row out.", "same-answer")
    return _with_template_variables({"prompt": prompt, **pair}, example)


def _messages(turns: Any, name: str) -> list[Message]:
    return [_message(turn, number) for number, turn in enumerate(turns_of(turns, name), 1)]


def _without_blank_end(messages: list[Message]) -> list[Message]:
    """The conversation without a last answer that says nothing."""
    last = messages[-1]
    is_blank = last["role"] == "assistant" and not last["content"].strip() and not last.get("tool_calls")
    return messages[:-1] if is_blank and len(messages) > 1 else messages


def _filled(text: Any, name: str, reason: str) -> str:
    if not isinstance(text, str):
        raise no_text(name, text)
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
    turn = with_tool_calls(turn, number)
    content = turn.get("content")
    if isinstance(content, str):
        message["content"] = content
    elif content is not None or not turn.get("tool_calls"):
        message["content"] = _joined(content, "content" in turn, number)
    if turn.keys() - {"role", "content"}:
        _other_keys(turn, message, number)
    return message


def with_tool_calls(turn: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """The turn with its calls as a list of objects; they may be JSON text, or one call alone.

    OpenAI's older files write one under `function_call`.
    """
    given = [key for key in CALLS if turn.get(key)]
    if not given:
        return turn
    if len(given) > 1:
        raise RowError(f"turn {number} has {' and '.join(given)}. Keep one of them.", "bad-tool-calls")
    calls = _calls(turn[given[0]], given[0], number)
    if given[0] == "function_call":
        calls = [{"type": "function", "function": call} for call in calls]
    return {key: item for key, item in turn.items() if key not in CALLS} | {"tool_calls": calls}


def _calls(given: Any, key: str, number: int) -> list[dict[str, Any]]:
    try:
        found = json.loads(given) if isinstance(given, str) else given
        found = found if isinstance(found, (list, tuple)) else [found]
        calls = [json.loads(call) if isinstance(call, str) else call for call in found]
    except (ValueError, RecursionError) as error:
        what = f"'{key}' of turn {number} is not valid JSON ({visible(str(error), 60)})"
        raise RowError(f"{what}. Mend it.", "bad-tool-calls") from None
    for call in calls:
        if not is_call(call):
            raise RowError(
                f"'{key}' of turn {number} holds {kind_of(call)}; expected calls such as "
                '{"type": "function", "function": {"name": "f", "arguments": {}}}.',
                "bad-tool-calls",
            )
    return calls


def is_call(call: Any) -> bool:
    """Whether a turn's call names its function, as `{"type": "function", "function": {"name": ...}}` or flat."""
    function = call.get("function", call) if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _joined(content: Any, is_given: bool, number: int) -> str:
    """The text of content parts such as `{"type": "text", "text": "..."}`."""
    if not isinstance(content, (list, tuple)):
        what = f"the content of turn {number} is {kind_of(content)}" if is_given else f"turn {number} has no content"
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
        ours = ALIASES.get(key, key)
        if ours == "train" and not isinstance(item, bool):
            what = f"'{key}' of turn {number} is {kind_of(item)}"
            raise RowError(f"{what}; expected true or false (a number is a weight).", "bad-weight")
        if ours == "weight":
            is_number = isinstance(item, (int, float)) and not isinstance(item, bool)
            if not is_number or not 0 <= item < math.inf:
                raise RowError(
                    f"'{key}' of turn {number} is {kind_of(item)}; expected a number from 0 on.", "bad-weight"
                )
            item = float(item)
        if key in CALLS and not item:
            continue
        if ours in message and message[ours] != item:
            names = " and ".join(name for name in turn if ALIASES.get(name, name) == ours)
            raise RowError(f"{names} of turn {number} say different things. Keep one of them.", "bad-weight")
        message[ours] = item


def unread_keys(example: Example) -> set[str]:
    """Keys of turns that are neither ours nor known to most chat templates."""
    keys: set[str] = set()
    for name in ("messages", "prompt", "completion", "chosen", "rejected"):
        if isinstance(turns := example.get(name), list):
            keys.update(*(turn.keys() - TURN_KEYS for turn in turns))
    return keys


def _with_system_prompt(messages: list[Message], system_prompt: str | None) -> list[Message]:
    if not system_prompt or messages[0]["role"] in INSTRUCTING:
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def check_turns(messages: Sequence[Message], last: int | None = None, answers_needed: bool = True) -> None:
    """The policy on the order of turns; `last` is how many at the end are the completion.

    Where no answer is needed, the two about a missing one do not hold.

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
    if answers_needed and "assistant" not in (roles[-last:] if last else turns):
        raise RowError("there is no assistant turn, so nothing is trained. Add the answer.", "no-assistant")
    if not turns:
        raise RowError("there is only a system turn. Write what the model is to answer.", "empty-prompt")
    if turns[0] != "user":
        raise RowError(
            f"the first turn is the {turns[0]}'s, which answers nothing. Put the user turn before it.",
            "assistant-first",
        )
    if answers_needed and roles[-1] != "assistant":
        raise RowError(
            f"the last turn is the {roles[-1]}'s, which no answer follows. Drop it, or add the assistant's reply.",
            "ends-with-user",
        )
    for number, message in enumerate(messages, 1):
        says_nothing = not message["content"].strip() and not message.get("tool_calls")
        if message["role"] == "assistant" and says_nothing and message.get("train", True):
            raise RowError(f"the assistant's turn {number} is empty. Write the answer.", "empty-answer")


def _with_template_variables(example: Example, given: Mapping[str, Any]) -> Example:
    """The example with the tools and the `chat_template_kwargs` of its row; null is none, as Parquet fills it in."""
    kwargs = given.get("chat_template_kwargs")
    if kwargs:
        if not isinstance(kwargs, dict) or not OWN_ARGUMENTS.isdisjoint(kwargs):
            ours = (
                "" if not isinstance(kwargs, dict) else f" without {', '.join(sorted(OWN_ARGUMENTS & kwargs.keys()))}"
            )
            raise RowError(
                f"'chat_template_kwargs' is {kind_of(kwargs)}; expected an object of the template's variables{ours}, "
                'such as {"enable_thinking": false}.',
                "bad-template-kwargs",
            )
        example["chat_template_kwargs"] = {key: item for key, item in kwargs.items() if item is not None}
    return _with_tools(example, given.get("tools"))


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
        raise RowError(f"'tools' is {kind_of(tools)}; expected a list of functions.", "bad-tools")
    example["tools"] = [tool if "name" not in tool else {"type": "function", "function": tool} for tool in tools]
    return example


def _no_media(value: Mapping[str, Any]) -> None:
    for name in MEDIA:
        if value.get(name):
            raise RowError(
                f"the row has {name}; only text is trained on. Leave the row or the column out.", "not-text"
            )


# The same example twice ----------------------------------------------------------------------------------------------


def count_duplicates(examples: Iterable[Example]) -> int:
    """Examples that repeat an earlier one, wherever they came from."""
    keys = [fingerprint(example) for example in examples]
    return len(keys) - len(set(keys))


def find_overlap(train: Iterable[Example], held_out: Iterable[Example]) -> int:
    """Held-out examples that are also trained on, which makes the evaluation look better than it is."""
    trained = {fingerprint(example) for example in train}
    return sum(fingerprint(example) in trained for example in held_out)


def fingerprint(example: Example) -> int:
    """The same number for examples that are the same word for word, wherever they came from; within one process."""
    own = {key: item for key, item in example.items() if key not in ("source", "line")}
    return hash(json.dumps(own, sort_keys=True, default=str))
