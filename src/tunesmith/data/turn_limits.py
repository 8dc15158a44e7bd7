r"""Tokens of a chat → the same with sources of at most max_source_length tokens and answers of max_target_length.

A source is what stands before an answer and is not trained, a target the answer with its stop token. Both are cut from
the right, but a source keeps its header: what the template writes between the last message and the answer.

    <|im_start|>user\n a long question <|im_end|>\n<|im_start|>assistant\n a long answer <|im_end|> \n
    └──────────── source ──────── ✂ ──┘└───────────── header ──────────────┘└─── target ─ ✂ ──┘ no stop is trained
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.data import IGNORE_INDEX
from tunesmith.data.chat_template import place_of
from tunesmith.data.render import Rendered, render_prompt
from tunesmith.data.rows import RowError
from tunesmith.data.spans import PROBE, trained_turns
from tunesmith.data.tokenize import Encoder, Tokens, added_tokens, encoder_of
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.normalize import Example, Message


class Limits(NamedTuple):
    """Tokens of one source, of one target, and of a whole row; `None`: any number."""

    source: int | None
    target: int | None
    row: int | None

    @property
    def total(self) -> int | None:
        """Where no further turn is added."""
        both = self.source + self.target if self.source is not None and self.target is not None else self.row
        return both if self.row is None else min(both, self.row)


class Turn(NamedTuple):
    """Token indices of one answer, its stop token included, and of the header before it."""

    header: int
    start: int
    stop: int
    is_stopped: bool = True
    """Whether the last token of the answer is a stop token."""


def fits(tokens: Tokens, limits: Limits) -> bool:
    """Whether nothing has to be cut; says no where several turns look like one."""
    if limits.total is not None and len(tokens["labels"]) > limits.total:
        return False
    for is_source, run in groupby(tokens["labels"], IGNORE_INDEX.__eq__):
        limit = limits.source if is_source else limits.target
        if limit is not None and sum(1 for _ in run) > limit:
            return False
    return True


def limited(tokens: Tokens, turns: Sequence[Turn], limits: Limits) -> tuple[Tokens, dict[str, str]]:
    """The row within the limits, and what was done to it: reason → detail.

    Later turns are left out from the first on that would not fit in `limits.total`. The stop token of a cut answer is
    kept where turns follow, so that they begin as the template begins them, but is not trained.

    Raises: DataError where `limits.source` leaves no room for a header.
    """
    kept: list[int] = []
    untrained: set[int] = set()
    done: dict[str, str] = {}
    begin = 0
    for number, turn in enumerate(turns):
        source = cut_prompt(range(begin, turn.start), limits.source, turn.start - max(begin, turn.header))
        target, is_cut = _cut_target(turn, limits.target, is_last=number == len(turns) - 1)
        if number and limits.total is not None and len(kept) + len(source) + len(target) > limits.total:
            done["later-turns-dropped"] = (
                f"{len(turns) - number} of {len(turns)} answers, {limits.total} tokens allowed"
            )
            break
        if len(source) < turn.start - begin:
            done.setdefault("source-cut", f"{turn.start - begin} tokens, max_source_length is {limits.source}")
        if is_cut:
            done.setdefault("target-cut", f"{turn.stop - turn.start} tokens, max_target_length is {limits.target}")
            untrained |= {target[-1]} if target[-1] == turn.stop - 1 else set()
            if not turn.is_stopped and all(turn.stop != other.start for other in turns):
                untrained.add(turn.stop)  # its label is the stop token, which the template does not write
        kept += [*source, *target]
        begin = turn.stop
    else:
        tail = range(begin, len(tokens["input_ids"]))
        if kept and kept[-1] == begin - 1 and (limits.total is None or len(kept) + len(tail) <= limits.total):
            kept += tail
    found: Tokens = {key: [values[index] for index in kept] for key, values in tokens.items()}
    found["labels"] = [IGNORE_INDEX if index in untrained else tokens["labels"][index] for index in kept]
    return found, done


def _cut_target(turn: Turn, limit: int | None, is_last: bool) -> tuple[list[int], bool]:
    """Indices of the answer's tokens within the limit, and whether it was cut."""
    indices = list(range(turn.start, turn.stop))
    if limit is None or len(indices) <= limit:
        return indices, False
    return (indices[:limit] if is_last or not turn.is_stopped else indices[: limit - 1] + indices[-1:]), True


def cut_prompt(ids: Sequence[int], max_source_length: int | None, header: int) -> list[int]:
    """The first tokens of a prompt and its `header` last: at most `max_source_length`, in training and prediction.

    Raises: DataError where the header alone is longer.
    """
    if max_source_length is None or len(ids) <= max_source_length:
        return list(ids)
    if header > max_source_length:
        raise DataError(
            f"max_source_length: {max_source_length} leaves no room for the {header} tokens that the chat template "
            f"writes between a message and its answer. Set it to more than {header}."
        )
    return [*ids[: max_source_length - header], *ids[len(ids) - header :]]


def header_length(
    messages: Sequence["Message"], tokenizer: "PreTrainedTokenizerBase", where: str = "", **options: Any
) -> int:
    """Tokens at the end of a prompt that the template writes behind the last message: what `cut_prompt` keeps.

    Args:
        messages: the conversation up to the answer.
        tokenizer: a fast one.
        where: the place that errors begin with.
        options: tools, chat_template and chat_template_kwargs, as `render_prompt` takes them.

    Raises: RowError where the template hides its header.
    """

    def prompt(some: Sequence["Message"]) -> Rendered:
        return render_prompt(some, tokenizer, where=where, **options)

    rendered = prompt(messages)
    encoded, _ = _encoder(tokenizer).encode(rendered)
    return len(encoded.ids) - bisect_right(encoded.ends, _header_start(messages, rendered.text, prompt, where))


# Where turns stand -------------------------------------------------------------------------------------------------


def has_turns(example: "Example", train_on: str) -> bool:
    """Whether sources and targets can be told apart: not in plain text, nor where all is trained."""
    return train_on != "all" and (example.get("messages") is not None or example.get("completion") is not None)


def find_turns(
    example: "Example",
    rendered: Rendered,
    tokens: Tokens,
    tokenizer: "PreTrainedTokenizerBase",
    train_on: str,
    prompt: Callable[[Sequence["Message"]], Rendered],
) -> list[Turn]:
    """The trained answers of a rendered example among its `tokens`.

    Args:
        prompt: renders a conversation up to its next answer, as the example was rendered.

    Raises: RowError where the template hides the header of an answer.
    """
    encoded, _ = _encoder(tokenizer).encode(rendered)
    ids = tokens["input_ids"]
    shift = 0 if ids[: len(encoded.ids)] == encoded.ids else len(added_tokens(tokenizer)[0])
    turns = []
    for span, before in zip(rendered.spans, _conversations(example, rendered, tokenizer, train_on)):
        text = rendered.text[: span.start]
        begin = span.start if before is None else _header_start(before, text, prompt, place_of(example))
        start, stop = encoded.first_from(span.start) + shift, encoded.first_from(span.end) + shift
        turns.append(Turn(min(bisect_right(encoded.ends, begin) + shift, start), start, stop))
    if rendered.add_suffix:
        turns[-1] = turns[-1]._replace(stop=len(ids))
    specials = set(tokenizer.all_special_ids)
    return [turn._replace(is_stopped=turn.stop > turn.start and ids[turn.stop - 1] in specials) for turn in turns]


def _encoder(tokenizer: "PreTrainedTokenizerBase") -> Encoder:
    if not tokenizer.is_fast:
        raise DataError(
            f"max_source_length, max_target_length: {type(tokenizer).__name__} does not say where its tokens stand. "
            "Use the model's fast tokenizer, or max_length alone."
        )
    return encoder_of(tokenizer)


def _conversations(
    example: "Example", rendered: Rendered, tokenizer: "PreTrainedTokenizerBase", train_on: str
) -> list[list["Message"] | None]:
    """What was said before each span's answer; `None` where no template wrote it."""
    prompt, completion = example.get("prompt"), example.get("completion")
    if isinstance(completion, str):
        return [None if not tokenizer.chat_template else [{"role": "user", "content": prompt}]] * len(rendered.spans)
    messages = example["messages"] if completion is None else [*prompt, *completion]
    first = None if completion is None else len(prompt)
    if rendered.left_out:
        head = 1 if messages[0]["role"] == "system" else 0
        messages = messages[:head] + messages[head + rendered.left_out :]
        first = None if first is None else max(0, first - rendered.left_out)
    turns = list(trained_turns(messages, train_on, first, place_of(example)))
    if len(turns) != len(rendered.spans):
        raise RowError(
            f"{place_of(example)}the template writes nothing for an answer that is empty, so turns cannot be told "
            "apart. Take that turn out, or leave max_source_length and max_target_length out.",
            "no-header",
        )
    return [messages[:index] for index in turns]


def _header_start(
    before: Sequence["Message"], text: str, prompt: Callable[[Sequence["Message"]], Rendered], where: str
) -> int:
    """The character of a prompt's `text` behind its last message; found by writing another message there."""
    if not before:
        return 0
    _, found, header = prompt([*before[:-1], {**before[-1], "content": PROBE}]).text.rpartition(PROBE)
    if not found or not text.endswith(header):
        raise RowError(
            f"{where}the chat template writes a header that depends on the message before it, so a long message "
            "cannot be cut. Shorten it, or leave max_source_length out.",
            "no-header",
        )
    return len(text) - len(header)
