"""A rendered conversation → the spans the loss covers: which turns are trained, and where their answers stand.

An answer begins where its prompt ends: `prompt_text` is the same for training and for generation.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from tunesmith.data.chat_template import Chat
from tunesmith.data.rows import RowError
from tunesmith.errors import TemplateError

if TYPE_CHECKING:
    from tunesmith.data.normalize import Message

PROBE = "\ue001"  # an answer that no person gives
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_HEADERS: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer → template and its variables → header


class Span(NamedTuple):
    """Characters `start` to `end` of the text count in the loss, times `weight`."""

    start: int
    end: int
    weight: float = 1.0


def trained_turns(messages: Sequence["Message"], train_on: str, first: int | None, where: str) -> dict[int, float]:
    """Index of each trained assistant turn → weight. `train` and `weight` of a message only narrow the choice.

    `first`: index of the first message of a row's completion.
    """
    flagged = [i for i, message in enumerate(messages) if _weight(message, i, where) != 1 or message.get("train")]
    if train_on == "all":
        narrowed = [i for i in flagged if _weight(messages[i], i, where) != 1]
        if narrowed:
            raise RowError(
                f"{where}turn {narrowed[0] + 1} has 'train' or 'weight', but train_on: all covers the whole text. "
                "Remove the flag, or set train_on: assistant.",
                "train-flag-with-all",
            )
        return {}
    for i in flagged:
        if messages[i]["role"] != "assistant" and _weight(messages[i], i, where) > 0:
            raise RowError(
                f"{where}turn {i + 1} ({messages[i]['role']}) has 'train' or 'weight', but only assistant turns can "
                "be trained. Remove the flag, or set train_on: all.",
                "train-not-assistant",
            )
    if first is None and train_on == "completion":
        first = max((i + 1 for i, message in enumerate(messages) if message["role"] == "user"), default=0)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= (first or 0)]
    turns = turns[-1:] if train_on == "last_turn" else turns
    return {i: weight for i in turns if (weight := _weight(messages[i], i, where)) > 0}


def _weight(message: "Message", index: int, where: str) -> float:
    if message.get("train") is False:
        return 0.0
    weight = message.get("weight")
    if weight is None:
        return 1.0
    if not isinstance(weight, int | float) or not math.isfinite(weight) or weight < 0:
        raise RowError(
            f"{where}turn {index + 1} has weight {weight!r}. Give a number from 0 on.",
            "bad-weight",
        )
    return float(weight)


def turn_spans(
    chat: Chat, messages: list[dict], turns: dict[int, float], full: str, controls: tuple[str, ...]
) -> list[Span]:
    """Where the trained turns' answers stand in `full`; control tokens in it must all be the template's own."""
    if marks_answers(chat.template):
        return _generation_spans(chat, messages, turns, full, controls)
    return [_turn_span(chat, messages, i, full, turns[i], controls) for i in turns]


@cache
def marks_answers(template: str) -> bool:
    """Whether the template has `{% generation %}`; templates are long, and asked about for each row."""
    return GENERATION_TAG.search(template) is not None


def prompt_text(chat: Chat, messages: list[dict]) -> str:
    """The conversation up to where the model writes its next answer."""
    if not messages:  # nothing can be rendered before a first turn
        return chat.text([{"role": "assistant", "content": PROBE}]).partition(PROBE)[0]
    headers = _HEADERS.setdefault(chat.tokenizer, {})
    key = (chat.template, repr(chat.kwargs))
    if key not in headers:
        headers[key] = _unprompted_header(replace(chat, tools=None))
    return chat.text(messages, add_generation_prompt=True) + headers[key]


def _unprompted_header(chat: Chat) -> str:
    """What a template that ignores add_generation_prompt writes before every answer, else nothing.

    White space alone is the model's to write: in Mistral's manner the answer follows `[/INST]` with no header.
    """
    user = {"role": "user", "content": "?"}
    try:
        bare = chat.text([user])
        if chat.text([user], add_generation_prompt=True) != bare:
            return ""
        probe = chat.text([user, {"role": "assistant", "content": PROBE}])
    except TemplateError:  # e.g. a template that insists on a system turn; the row itself will tell
        return ""
    header = probe[len(bare) :].partition(PROBE)[0] if probe.startswith(bare) and PROBE in probe else ""
    return header if header.strip() else ""


def _turn_span(
    chat: Chat, messages: list[dict], index: int, full: str, weight: float, controls: tuple[str, ...]
) -> Span:
    """What the template writes for an assistant turn behind its prompt, up to and with its stop token."""
    is_last = index == len(messages) - 1
    through = full if is_last else chat.text(messages[: index + 1])
    if not full.startswith(through):
        raise _rewritten(chat, index, through, full)
    prompt = prompt_text(chat, messages[:index])
    if not full.startswith(prompt):
        raise _rewritten(chat, index, prompt, full, unprompted=chat.text(messages[:index]) if index else "")
    return Span(len(prompt), _after_stop(full, len(prompt), len(through), controls), weight)


def _rewritten(chat: Chat, index: int, part: str, full: str, unprompted: str | None = None) -> TemplateError:
    """Why `part` is no beginning of `full`, with the place where they part."""
    at = next((i for i, (a, b) in enumerate(zip(part, full)) if a != b), min(len(part), len(full)))
    difference = f"{part[at : at + 24]!r} becomes {full[at : at + 24]!r}"
    if unprompted is not None and full.startswith(unprompted):
        return chat.refusal(
            f"turn {index + 1} does not begin with the template's own generation prompt ({difference}), so training "
            "and generation would differ. Use a template with {% generation %}"
        )
    return chat.refusal(
        f"turn {index + 1} is rendered differently once later turns follow ({difference}). "
        "Set train_on: last_turn, or use a template with {% generation %}"
    )


def _after_stop(full: str, start: int, end: int, controls: tuple[str, ...]) -> int:
    """`end`, or the end of the control token that only white space separates from it."""
    body = full[start:end].rstrip()
    return start + len(body) if body.endswith(controls) else end


def _generation_spans(
    chat: Chat, messages: list[dict], turns: dict[int, float], full: str, controls: tuple[str, ...]
) -> list[Span]:
    """Spans of the `{% generation %}` blocks of the trained turns; a stop token right behind a block belongs to it."""
    tracked, ranges = chat.generation_ranges(messages)
    if tracked != full:
        raise chat.refusal("the template renders the same conversation differently each time")
    assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(ranges) == len(assistant):
        weights = [turns.get(i, 0.0) for i in assistant]
    elif turns == dict.fromkeys(assistant, 1.0):
        weights = [1.0] * len(ranges)
    else:
        raise chat.refusal(
            f"the template marks {len(ranges)} parts with {{% generation %}} for {len(assistant)} assistant turns, so "
            "single turns cannot be chosen. Set train_on: assistant and remove train/weight from the messages"
        )
    spans = []
    for (start, end), weight in zip(ranges, weights):
        end = _after_stop(full, start, end, controls)
        if not full[start:end].endswith(controls):
            end += len(next((token for token in controls if full.startswith(token, end)), ""))
        spans.append(Span(start, end, weight))
    return spans
