"""FORMATS: the shapes that rows come in, and how each is read: a text, a conversation, a prompt with answers.

A reader moves columns to where they belong; whether what it finds can be trained on is for normalize.py to say.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tunesmith.data.report import visible
from tunesmith.data.rows import RowError
from tunesmith.lookup import did_you_mean

INSTRUCTING = ("system", "developer")
ASKING = ("user", "human")
OF_CHATS = ("tools", "chat_template_kwargs")  # columns that any conversation may have
# Arguments of apply_chat_template that the renderer sets itself.
OWN_ARGUMENTS = {
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation"),
    *("return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "tools"),
}


class Format(NamedTuple):
    """How rows of one shape are told apart and read."""

    columns: tuple[str, ...]
    """The columns that identify it, and that a row must have."""
    optional: tuple[str, ...]
    """Further columns that it reads."""
    read: Callable[[dict[str, Any]], dict[str, Any]]
    """Row → Example without its place; what it returns is checked by `normalize`."""
    doc: str


def read_alpaca(value: dict[str, Any]) -> dict[str, Any]:
    """Instruction and input are one user turn, a line apart; `history` holds earlier pairs of turns, oldest first."""
    messages = alpaca_prompt(value)
    messages.append({"role": "assistant", "content": _string(value, "output")})
    return {"messages": _with_system_column(messages, value), **_of_chat(value)}


def alpaca_prompt(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns before the answer; RowError if nothing is asked."""
    question = alpaca_question(value)
    if not question.strip():
        raise RowError("'instruction' and 'input' are both empty. Write what the answer answers.", "empty-prompt")
    messages: list[dict[str, Any]] = []
    history = value.get("history") or ()
    if not isinstance(history, (list, tuple)):
        what = f"'history' is {kind_of(history)}; expected a list of pairs [question, answer]."
        raise RowError(what, "bad-history")
    for pair in history:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(turn, str) for turn in pair)):
            what = visible(repr(pair), 60)
            raise RowError(f"'history' holds {what}; expected pairs [question, answer] of texts.", "bad-history")
        messages += ({"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]})
    return [*messages, {"role": "user", "content": question}]


def alpaca_question(value: Mapping[str, Any]) -> str:
    """Instruction and input a line apart, or the one of them that says something."""
    return "\n".join(part for part in (_string(value, "instruction"), _string(value, "input", "")) if part)


def read_sharegpt(value: dict[str, Any]) -> dict[str, Any]:
    """Turns under `conversations`, as from/value or role/content; `system` and `tools` columns."""
    return _conversation(value, "conversations")


def read_messages(value: dict[str, Any]) -> dict[str, Any]:
    """Turns under `messages`, in the same shapes; content is a text or a list of text parts.

    OpenAI's older files have `functions` in place of `tools`.
    """
    functions = value.get("functions")
    are_tools = isinstance(functions, list) and all(isinstance(one, dict) and "name" in one for one in functions)
    if are_tools and not value.get("tools"):
        value = {**value, "tools": functions}
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
    if completion == "" and not isinstance(prompt, str):
        completion = []
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


def read_preference(value: dict[str, Any]) -> dict[str, Any]:
    """A prompt and two answers, the better one under `chosen`.

    The prompt is turns (`prompt`, `messages`, `conversations`), or a text (`prompt`, or Alpaca's columns). Answers are
    texts, turns, or lists of turns; as whole conversations they hold the prompt as their common beginning. In the
    oldest form `output` is a list of both, the better one first, and further ones are not read.
    """
    chosen, rejected = _two_answers(value)
    prompt = _prompt_before_answers(value, chosen)
    if not prompt and not (opens_conversation(chosen) and opens_conversation(rejected)):
        raise RowError("there is no prompt. Add one, or turns to 'chosen' and 'rejected' from the first.", "no-prompt")
    prompt, chosen, rejected = without_prompt(prompt, chosen, rejected)
    prompt = _with_system_column(prompt, value) if prompt else prompt
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **_of_chat(value)}


def _two_answers(value: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    pair = value.get("output")
    if "chosen" not in value and "rejected" not in value and isinstance(pair, (list, tuple)):
        if len(pair) < 2:
            raise RowError(f"'output' is {kind_of(pair)}; expected [better, worse].", "one-answer")
        return _answer(pair[0], "output"), _answer(pair[1], "output")
    for name in ("chosen", "rejected"):
        if column(value, name) in (None, "", []):
            raise RowError(
                f"'{name}' is {kind_of(value[name])}. Write the answer, or leave the row out.", "one-answer"
            )
    return _answer(value["chosen"], "chosen"), _answer(value["rejected"], "rejected")


def _answer(answer: Any, name: str) -> list[dict[str, Any]]:
    """An answer as turns."""
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return [_as_role_and_content(turn) for turn in turns_of([answer] if isinstance(answer, dict) else answer, name)]


def _prompt_before_answers(value: Mapping[str, Any], chosen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns before the answers; none where the row has no such column.

    Turns that end with the better answer are no prompt: UltraFeedback repeats it in `messages`.
    """
    for name in ("messages", "conversations", "prompt"):
        if value.get(name) is None:
            continue
        turns = _prompt_turns(value[name], name)
        if turns[-1].get("role") in ASKING or turns[-len(chosen) :] != chosen:
            return turns
    return alpaca_prompt(value) if "instruction" in value else []


def _prompt_turns(prompt: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(prompt, str):
        return [_as_role_and_content(turn) for turn in turns_of(prompt, name)]
    if not prompt.strip():
        raise RowError(f"'{name}' is empty. Write what the answers answer.", "empty-prompt")
    return [{"role": "user", "content": prompt}]


def without_prompt(
    prompt: list[dict[str, Any]], chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """The prompt, and what each answer says after it; one or both of them may be whole conversations."""
    if opens_conversation(chosen) and opens_conversation(rejected):
        return common_beginning(prompt, chosen, rejected)
    return prompt, _answer_after(prompt, chosen, "chosen"), _answer_after(prompt, rejected, "rejected")


def _answer_after(prompt: list[dict[str, Any]], turns: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    if not opens_conversation(turns) or turns == prompt:  # which holds no answer, as will be found
        return turns
    if turns[: len(prompt)] != prompt:
        raise RowError(
            f"'{name}' is a conversation that does not begin with the prompt. Give both answers alone, or both "
            "conversations from the first turn.",
            "two-prompts",
        )
    return turns[len(prompt) :]


def opens_conversation(turns: list[dict[str, Any]]) -> bool:
    """Whether turns are a conversation from its first turn, and no answer alone."""
    return turns[0].get("role") in (*INSTRUCTING, *ASKING)


def common_beginning(
    prompt: list[dict[str, Any]], chosen: list[dict[str, Any]], rejected: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Two whole conversations as what both begin with and what is left of each; at least their last turns are."""
    most = min(len(chosen), len(rejected)) - 1
    common = next((n for n in range(most) if chosen[n] != rejected[n]), most)
    begin = chosen[:common]
    if prompt and prompt != begin[: len(prompt)] and prompt[-1].get("content") not in _contents(begin):
        raise RowError("the prompt is not how 'chosen' and 'rejected' begin. Keep one of them.", "two-prompts")
    if not any(turn.get("role") in ASKING for turn in begin):
        raise RowError(
            "'chosen' and 'rejected' do not begin with the same turns. Pair answers to one prompt.", "no-prompt"
        )
    return begin, chosen[common:], rejected[common:]


def _contents(turns: list[dict[str, Any]]) -> list[Any]:
    return [turn.get("content") for turn in turns]


# Where a row has the columns of several formats, the first that fits is taken.
FORMATS: dict[str, Format] = {
    "messages": Format(
        ("messages",),
        ("system", "functions", *OF_CHATS),
        read_messages,
        "turns as role and content, as in OpenAI's files",
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
    "preference": Format(
        ("chosen", "rejected"),
        ("prompt", "messages", "conversations", "instruction", "input", "output", "history", "system", *OF_CHATS),
        read_preference,
        "a prompt with a better and a worse answer, for stage rm",
    ),
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
        raise no_text(name, found)
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


def no_text(name: str, value: Any) -> RowError:
    """The error of a value that should be a text, with what to do about its kind."""
    is_list = isinstance(value, list | tuple)
    way = "Join its parts, or write a row for each" if is_list and value else "Put it in quotes or leave the row out"
    return RowError(f"'{name}' is {kind_of(value)}, not a text. {way}.", "bad-content")


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
