"""Example + chat template → Rendered(text, spans the loss covers); messages → the prompt of their answer.

A span is what the model has to write by itself: from the end of the generation prompt to the end of the stop token.
`{% generation %}` in a template gives the spans; otherwise they are differences of rendered prefixes. A template that
renders earlier turns differently once later ones follow is refused, never guessed at.

Control tokens inside a person's messages are text: they are reported in `literal` and never close a span. Text rows
(and prompt/completion strings without a chat template) are the person's own rendering, so control tokens there count.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from tunesmith.data.chat_template import Chat, place_of, refusal
from tunesmith.data.formats import INSTRUCTING
from tunesmith.data.rows import RowError
from tunesmith.data.spans import Span, prompt_text, trained_turns, turn_spans, untrained_spans, unwritten_stops

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.config import TrainOn
    from tunesmith.data.normalize import Example, Message

FILLER = "\ue000"  # stands for each character of a control token that a person wrote


class Rendered(NamedTuple):
    """What the model reads, as one string, and which of it the loss covers."""

    text: str
    """Control tokens are part of it, as text."""
    spans: list[Span]
    """Sorted and disjoint."""
    literal: Sequence[tuple[int, int]] = ()
    """Character ranges that look like control tokens but were written by a person: tokenized as plain text."""
    add_bos: bool = False
    """Put in front what the tokenizer puts there by habit, unless the text begins with it."""
    add_suffix: bool = False
    """Put behind what the tokenizer puts there by habit, unless the text ends with it."""
    stops: Sequence[tuple[int, float]] = ()
    """Where an answer ends although the template writes no stop token there, and the answer's weight: the model has
    to write the stop token in place of what follows."""
    untrained: Sequence[Span] = ()
    """Other answers: no token reaches over their edges, in training and in prompts alike."""
    left_out: int = 0
    """Earlier turns that the template does not write."""
    unwritten: str = ""
    """What else of trained turns it does not write, in words."""


def render(
    example: "Example",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    train_on: "TrainOn" = "assistant",
    chat_template: str | None = None,
    append_eos: bool = True,
    add_special_tokens: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Rendered:
    """The text of an example and the spans that `train_on` selects; an example may come out with no span at all.

    Args:
        example: one of `{text}`, `{messages, tools?}`, `{prompt, completion}`.
        tokenizer: read for its template and control tokens, not changed.
        train_on: "assistant" every assistant turn; "last_turn" the last one; "completion" what the assistant wrote
            after the last user turn, or the row's `completion`; "all" the whole text but a leading BOS. Of a
            prompt/completion row the prompt's turns are trained only by "all". Text rows are trained whole.
        chat_template: Jinja text used in place of the tokenizer's own.
        append_eos: a text (and prompt and completion strings without a chat template) ends with the stop token.
        add_special_tokens: it also gets what the tokenizer puts around every text, such as BOS.
        chat_template_kwargs: further variables of the template; the example's own win.

    Raises: TemplateError (with `.reason`) where the template fails or cannot tell what to train; RowError where the
        row's own flags do.
    """
    if example.get("text") is not None:
        text = example["text"]
        return _render_plain(text, 0, append_eos, add_special_tokens, tokenizer, place_of(example))
    prompt, completion = example.get("prompt"), example.get("completion")
    if isinstance(completion, str):
        if not (chat_template or tokenizer.chat_template):
            begin = 0 if train_on == "all" else len(prompt)
            text = prompt + completion
            return _render_plain(text, begin, append_eos, add_special_tokens, tokenizer, place_of(example))
        prompt = [{"role": "user", "content": prompt}]
        completion = [{"role": "assistant", "content": completion}]
    messages = example["messages"] if completion is None else [*prompt, *completion]
    kwargs = {**(chat_template_kwargs or {}), **(example.get("chat_template_kwargs") or {})}
    chat = Chat.of(tokenizer, chat_template, example.get("tools"), place_of(example), kwargs)
    return _render_chat(chat, messages, train_on, first=len(prompt) if completion is not None else None)


def render_prompt(
    messages: Sequence["Message"],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    tools: list[dict] | None = None,
    chat_template: str | None = None,
    where: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Rendered:
    """The conversation up to where its next answer begins, without spans: the text before that answer in training.

    Args:
        messages: what was said so far; none, and the answer opens the conversation.
        tokenizer: read for its template and control tokens, not changed.
        tools: as the template writes them.
        chat_template: Jinja text used in place of the tokenizer's own.
        where: the place that errors begin with.
        chat_template_kwargs: further variables of the template.

    Raises: as `render`.
    """
    chat = Chat.of(tokenizer, chat_template, tools, where, chat_template_kwargs)
    messages, left_out = chat.within_reach(list(messages))
    plain, masked, masked_messages, has_hidden = _hidden(chat, messages)
    full = prompt_text(masked, masked_messages)
    _check_written(masked, masked_messages, {}, full)
    answers = untrained_spans(masked, masked_messages, full, control_tokens(tokenizer))
    text = prompt_text(chat, plain) if has_hidden else full
    literal = _literal_ranges(text, full, where) if has_hidden else ()
    return Rendered(text, [], literal, untrained=answers, left_out=left_out)


def control_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """The tokenizer's special tokens, longest first.

    Added tokens that are not special (`<think>`, `<tool_call>` of many models) are words of an answer like others.
    """
    key = (len(tokenizer), tokenizer.eos_token)
    cached = _CONTROLS.get(tokenizer)
    if cached is None or cached[0] != key:
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        known = {str(token) for token in tokenizer.all_special_tokens} | added
        cached = _CONTROLS[tokenizer] = (key, tuple(sorted(known - {""}, key=lambda token: (-len(token), token))))
    return cached[1]


_CONTROLS: WeakKeyDictionary = WeakKeyDictionary()  # a large vocabulary has hundreds; looking each row is slow


def drop_oldest_turns(example: "Example") -> "Example | None":
    """The example without its oldest exchange: the turns before the second user turn, the system turns stay.

    Returns: None when nothing can go (text rows, strings, one exchange left).
    """
    key = "messages" if example.get("messages") is not None else "prompt"
    messages = example.get(key)
    if not isinstance(messages, list):
        return None
    begin = next((i for i, message in enumerate(messages) if message["role"] not in INSTRUCTING), len(messages))
    second = next((i for i in range(begin + 1, len(messages)) if messages[i]["role"] == "user"), None)
    if second is None:
        return None
    return {**example, key: messages[:begin] + messages[second:]}


def _render_plain(
    text: str, begin: int, append_eos: bool, add_special: bool, tokenizer: "PreTrainedTokenizerBase", where: str
) -> Rendered:
    """A text as it is, trained from `begin` on; prompt and completion of base models are one, laid end to end."""
    if append_eos and not text.endswith(eos := _eos(tokenizer, where)):
        text += eos
    return Rendered(text, [Span(begin, len(text))], add_bos=add_special, add_suffix=add_special)


def _eos(tokenizer: "PreTrainedTokenizerBase", where: str) -> str:
    if not tokenizer.eos_token:
        raise refusal(
            where,
            "no stop token ends the text, and the tokenizer has no eos_token. Name one of its tokens in "
            "eos_token, or use a chat template that writes a stop token after each answer",
        )
    return str(tokenizer.eos_token)


def _render_chat(chat: Chat, messages: list["Message"], train_on: str, first: int | None) -> Rendered:
    """Render, choose the turns, find their spans; `first`: index of the first message of a row's completion."""
    messages, left_out = chat.within_reach(messages)
    turns = trained_turns(messages, train_on, None if first is None else max(0, first - left_out), chat.where)
    controls = control_tokens(chat.tokenizer)
    plain, masked, masked_messages, has_hidden = _hidden(chat, messages)
    full, ranges = masked.marked_text(masked_messages)
    _check_written(masked, masked_messages, turns, full)
    text = chat.text(plain) if has_hidden else full
    literal = _literal_ranges(text, full, chat.where) if has_hidden else ()
    if turns:
        answers = turn_spans(masked, masked_messages, turns, full, ranges, controls)
    else:
        answers = untrained_spans(masked, masked_messages, full, controls)
    spans = [span for span in answers if span.weight > 0]
    if train_on == "all":
        begin = len(bos) if (bos := chat.tokenizer.bos_token) and full.startswith(bos) else 0
        spans = [Span(begin, len(full))]
    is_last_trained = train_on == "all" or len(messages) - 1 in turns
    if spans and is_last_trained and plain[-1]["role"] == "assistant":
        text, spans = _with_stop(text, full, spans, controls, chat)
    stops = [] if train_on == "all" else unwritten_stops(full, spans, controls)
    spans = [span for span in spans if span.start < span.end]
    untrained = [span for span in answers if span.weight == 0]
    unwritten = _unwritten(masked_messages, turns, full)
    return Rendered(text, spans, literal, stops=stops, untrained=untrained, left_out=left_out, unwritten=unwritten)


def _check_written(chat: Chat, messages: list[dict], turns: Mapping[int, float], full: str) -> None:
    """Raise TemplateError where the template leaves out a turn that is no answer, a tool call, words beside one, or
    the tools.

    Many templates know nothing of tools: such a turn would come out empty, and teach the model to say nothing.
    """
    tools = [*_called({"tool_calls": chat.tools})]
    calls = Counter(tools)
    for index, message in enumerate(messages):
        if not _writes_content(message, index in turns, full):
            what = "the words beside the tool call in " if message["role"] == "assistant" else ""
            raise chat.refusal(
                f"the chat template does not write {what}turn {index + 1} ({message['role']}). Take "
                f"{'them' if what else 'that turn'} out, or set chat_template: to a template that writes "
                f"{'them' if what else 'it'}",
                "turn-not-written",
            )
        for name in _called(message):
            calls[name] += 1
            if full.count(name) < calls[name]:
                raise chat.refusal(
                    f"the chat template does not write the call of tool {name!r} in turn {index + 1}. Set "
                    "chat_template: to a template for tools, or write the call as the turn's content",
                    "call-not-written",
                )
    for name in tools:
        if name not in full:
            raise chat.refusal(
                f"the chat template does not write the tool {name!r}. Set chat_template: to a template for tools, or "
                "leave tools out of the row",
                "tools-not-written",
            )


def _writes_content(message: dict, is_trained: bool, full: str) -> bool:
    """Whether a turn's words are there; of answers only those beside a trained call are looked for.

    Templates may leave an earlier answer's thoughts out, and write a tool's answer as JSON, or read it as such: then
    its longest word counts.
    """
    content, role = message.get("content"), message["role"]
    if not isinstance(content, str) or (role == "assistant" and not (is_trained and message.get("tool_calls"))):
        return True
    content = content.rpartition("</think>")[2].strip() if role == "assistant" else content.strip()
    if role in ("system", "developer", "user", "assistant") or content[:64] in full:
        return content[:64] in full
    if json.dumps(content, ensure_ascii=False)[1:-1][:48] in full:
        return True
    return content[:1] in "[{" and max(re.findall(r"\w+", content) or [""], key=len) in full


THOUGHTS = ("reasoning_content", "reasoning", "thinking", "function_call")
"""Keys of a turn beside its content that some templates write."""


def _unwritten(messages: list[dict], turns: Mapping[int, float], full: str) -> str:
    """Keys of trained turns whose text the template does not write, said in words."""
    found: Counter[str] = Counter()
    for index in turns:
        for key in THOUGHTS:
            value = messages[index].get(key)
            value = value.get("name") if isinstance(value, Mapping) else value
            if isinstance(value, str) and value.strip()[:64] not in full:
                found[key] += 1
    return ", ".join(f"{key} of {count} turns" if count > 1 else key for key, count in found.items())


def _called(message: dict) -> Iterator[str]:
    for call in message.get("tool_calls") or ():
        name = call.get("function", call).get("name") if isinstance(call, dict) else None
        if isinstance(name, str):
            yield name


def for_template(message: "Message") -> dict[str, Any]:
    """Without our own keys, and without None: templates crash on it, or write 'None'."""
    return {key: value for key, value in message.items() if value is not None and key not in ("train", "weight")}


def _hidden(chat: Chat, messages: Sequence["Message"]) -> tuple[list[dict], Chat, list[dict], bool]:
    """The turns as the template takes them; chat and turns without the person's control tokens; whether there are any.

    Structure is read off a rendering in which those are replaced, so that they cannot pass for the template's own.
    """
    hidden = _Hider(control_tokens(chat.tokenizer))
    try:
        plain = chat.with_arguments([for_template(message) for message in messages])
        masked = replace(chat, tools=hidden(chat.tools), kwargs=hidden(chat.kwargs))
        return plain, masked, hidden(plain), hidden.found
    except RecursionError:
        what = "a tool call, a tool or another value of the row is nested too deeply. Simplify it"
        raise chat.refusal(what, "too-deep") from None


class _Hider:
    """Copies a value with each control token in its strings replaced by equally many fillers; notes if any was."""

    def __init__(self, controls: tuple[str, ...]):
        self.controls = controls
        self.pattern = _pattern(controls)
        self.found = False

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            if not self.pattern.search(value):
                return value
            self.found = True
            return self.pattern.sub(lambda match: FILLER * len(match[0]), value)
        if isinstance(value, dict):
            return {self(key): self(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self(item) for item in value]
        return value


@cache
def _pattern(controls: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(map(re.escape, controls)) or "(?!)")  # (?!) never matches


def _literal_ranges(text: str, masked: str, where: str) -> list[tuple[int, int]]:
    """Where the two renderings differ; that must be exactly where fillers stand."""
    runs = [match.span() for match in re.finditer(f"{FILLER}+", masked)]
    ranges = [(start, end) for start, end in runs if len(text) == len(masked) and text[start:end] != masked[start:end]]
    gaps = zip([0, *(end for _, end in ranges)], [*(start for start, _ in ranges), len(text)])
    if len(text) != len(masked) or any(text[start:end] != masked[start:end] for start, end in gaps):
        raise RowError(
            f"{where}a message contains a control token, and the chat template renders the conversation differently "
            "because of it, so it cannot be kept as plain text. Remove it from the message.",
            "control-token-in-content",
        )
    return ranges


def _with_stop(
    text: str, full: str, spans: list[Span], controls: tuple[str, ...], chat: Chat
) -> tuple[str, list[Span]]:
    """The text with eos behind its last answer, inside the span, where the template wrote no stop token."""
    last = spans[-1]
    if full[last.start : last.end].rstrip().endswith(controls):
        return text, spans
    text += _eos(chat.tokenizer, chat.where)
    return text, [*spans[:-1], last._replace(end=len(text))]
