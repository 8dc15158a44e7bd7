"""A rendered conversation → the spans the loss covers: which turns are trained, and where their answers stand.

An answer begins where its prompt ends: `prompt_text` is the same for training and for generation.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from tunesmith.data.chat_template import Chat
from tunesmith.data.rows import RowError
from tunesmith.errors import TemplateError

if TYPE_CHECKING:
    from tunesmith.data.normalize import Message

PROBE = "\ue001"  # an answer that no person gives
_HEADERS: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer → template and its variables → header
_STOPS: WeakKeyDictionary = WeakKeyDictionary()  # likewise → whether it writes a stop token


class Span(NamedTuple):
    """Characters `start` to `end` of the text count in the loss, times `weight`."""

    start: int
    end: int
    weight: float = 1.0


def trained_turns(messages: Sequence["Message"], train_on: str, first: int | None, where: str) -> dict[int, float]:
    """Index of each trained assistant turn → weight. `train` and `weight` of a message only narrow the choice.

    `first`: index of the first message of a row's completion.
    """
    given = ("train", "weight")
    flagged = [i for i, message in enumerate(messages) if any(message.get(key) is not None for key in given)]
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
    chat: Chat,
    messages: list[dict],
    turns: dict[int, float],
    full: str,
    ranges: list[tuple[int, int]] | None,
    controls: tuple[str, ...],
) -> list[Span]:
    """Where the answers stand in `full`, those that are not in `turns` with weight 0.

    Control tokens in `full` must all be the template's own. An answer that is not trained may be missing.
    """
    if ranges is not None:
        return _generation_spans(chat, messages, turns, full, ranges, controls)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            with nullcontext() if i in turns else suppress(TemplateError):
                spans.append(_turn_span(chat, messages, i, full, turns.get(i, 0.0), controls))
    return spans


def untrained_spans(chat: Chat, messages: list[dict], text: str, controls: tuple[str, ...]) -> list[Span]:
    """Where the answers stand in a text of which none is trained by itself, such as a prompt; all have weight 0."""
    if not any(message["role"] == "assistant" for message in messages):
        return []
    try:
        full, ranges = chat.marked_text(messages)
        return turn_spans(chat, messages, {}, full, ranges, controls) if text.startswith(full) else []
    except TemplateError:  # e.g. tags around several turns
        return []


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
    chat: Chat,
    messages: list[dict],
    turns: dict[int, float],
    full: str,
    ranges: list[tuple[int, int]],
    controls: tuple[str, ...],
) -> list[Span]:
    """Spans of the `{% generation %}` blocks of the trained turns; a stop token right behind a block belongs to it."""
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
    spans, writes_stop = [], _writes_stop(chat, controls)
    for (start, end), weight in zip(ranges, weights):
        end = _after_stop(full, start, end, controls)
        if writes_stop and not full[start:end].endswith(controls):
            end += len(next((token for token in controls if full.startswith(token, end)), ""))
        spans.append(Span(start, end, weight))
    return spans


def _writes_stop(chat: Chat, controls: tuple[str, ...]) -> bool:
    """Whether the control token behind an answer ends it, and does not just begin the next question (Baichuan's)."""
    stops = _STOPS.setdefault(chat.tokenizer, {})
    key = (chat.template, repr(chat.kwargs))
    if key not in stops:
        answer = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
        try:
            behind = replace(chat, tools=None).text(answer).rpartition(PROBE)[2]
        except TemplateError:  # a template with demands of its own; the row itself will tell
            return True
        stops[key] = behind.lstrip().startswith(controls)
    return stops[key]


def unwritten_stops(full: str, spans: Sequence[Span], controls: tuple[str, ...]) -> list[tuple[int, float]]:
    """Ends and weights of answers that other text follows without a stop token.

    As if each were the last of its conversation: there, eos is put behind it.
    """
    return [
        (span.end, span.weight)
        for span in spans
        if span.end < len(full) and not full[span.start : span.end].rstrip().endswith(controls)
    ]
