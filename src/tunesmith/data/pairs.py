"""Preference rows → pairs of token rows: one prompt, the better answer, the worse one, and where the two part.

chosen_input_ids    | prompt ............ | good answer, stop |
rejected_input_ids  | prompt ............ | go away, stop |
first_difference                            ^  "go" is shared, what follows it is not
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import datasets

from tunesmith.data import IGNORE_INDEX
from tunesmith.data.chat_template import place_of
from tunesmith.data.formats import kind_of, without_prompt
from tunesmith.data.normalize import CALLS, check_turns, with_tool_calls
from tunesmith.data.prepare import batched
from tunesmith.data.render import Rendered, drop_oldest_turns, render
from tunesmith.data.report import Report
from tunesmith.data.rows import Row, RowError
from tunesmith.data.tokenize import Tokens, tokenize
from tunesmith.data.turn_limits import cut_prompt, header_length
from tunesmith.errors import DataError, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("chosen", "rejected")
BATCH_PAIRS = 500
PAIR_TYPES = datasets.Features(
    {
        "index": datasets.Value("int64"),
        "chosen_input_ids": datasets.List(datasets.Value("int64")),
        "rejected_input_ids": datasets.List(datasets.Value("int64")),
        "first_difference": datasets.Value("int64"),
    }
)


class Pair(TypedDict):
    """Two conversations that begin alike."""

    index: int
    """Which of the examples it is, from 0; those that were dropped leave gaps."""
    chosen_input_ids: list[int]
    """Prompt, better answer, stop token; nothing that the template writes behind it."""
    rejected_input_ids: list[int]
    first_difference: int
    """The first position whose tokens differ."""


class Side(NamedTuple):
    """One conversation of a pair."""

    ids: list[int]
    prompt_length: int


@dataclass(frozen=True)
class PairEncoding:
    """How preference examples become pairs: the training options of these names."""

    max_length: int | None = None
    too_long: str = "truncate"
    on_bad_row: str = "error"
    chat_template_kwargs: Mapping[str, Any] | None = None
    max_source_length: int | None = None
    max_target_length: int | None = None


def encode_pairs(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    report: Report,
    *,
    max_length: int | None = None,
    too_long: str = "truncate",
    on_bad_row: str = "error",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
) -> datasets.Dataset:
    """Preference examples as rows of `Pair`.

    Args:
        examples: `{"prompt", "chosen", "rejected", "tools"?, "chat_template_kwargs"?, "source", "line"}`: lists of
            turns, or (for tokenizers without a chat template) strings.
        report: every pair that is dropped or changed is counted there; its tokens are those of both conversations,
            and trained are those from the first difference on.
        max_length: longest conversation, in tokens.
        too_long: as in training. `truncate` cuts each answer's end; `truncate_left` cuts the prompt's beginning, as
            much of it for both. A pair that differs nowhere within the limits is dropped.
        on_bad_row: `error` raises where the template refuses a conversation; else such pairs are dropped.
        chat_template_kwargs: variables of the template; an example's own win.
        max_source_length, max_target_length: longest prompt and longest answer; the end of a longer one is cut, but
            a prompt keeps what the template writes between its last message and the answer.

    Raises: RowError, TemplateError, DataError with the row's place.
    """
    how = PairEncoding(max_length, too_long, on_bad_row, chat_template_kwargs, max_source_length, max_target_length)
    parts = [as_pairs([])]
    for batch in batched(enumerate(examples), BATCH_PAIRS):
        parts.append(as_pairs(encode_pair_batch(batch, tokenizer, how, report)))
    return datasets.concatenate_datasets(parts)


def as_pairs(pairs: Sequence[Pair]) -> datasets.Dataset:
    """Pairs as a table."""
    return datasets.Dataset.from_dict({name: [pair[name] for pair in pairs] for name in PAIR_TYPES}, PAIR_TYPES)


def encode_pair_batch(
    examples: Sequence[tuple[int, Mapping[str, Any]]],
    tokenizer: "PreTrainedTokenizerBase",
    how: PairEncoding,
    report: Report,
) -> list[Pair]:
    """The pairs that can be trained on, in their order; `examples` with their numbers."""
    pairs = []
    for index, example, sides in _tokenized(examples, tokenizer, how, report):
        try:
            pair = fit_pair(index, example, sides, tokenizer, how, report)
        except RowError as error:
            _refused(error, example, how, report)
            continue
        if pair is not None:
            pairs.append(pair)
            report.add_tokens(token_rows(pair))
    report.kept += len(pairs)
    return pairs


def _tokenized(
    examples: Sequence[tuple[int, Mapping[str, Any]]],
    tokenizer: "PreTrainedTokenizerBase",
    how: PairEncoding,
    report: Report,
) -> Iterator[tuple[int, Mapping[str, Any], tuple[Side, Side]]]:
    """Each example with its number and both sides; those that cannot be rendered raise or are counted."""
    good: list[tuple[int, Mapping[str, Any]]] = []
    rendered: list[Rendered] = []
    for index, example in examples:
        try:
            both = [render(one, tokenizer, train_on="completion") for one in apart(example, how)]
        except (RowError, TemplateError) as error:
            _refused(error, example, how, report)
            continue
        good.append((index, example))
        rendered += both
    errors: dict[int, RowError] = {}
    tokens = tokenize(rendered, tokenizer, on_error=lambda number, error: errors.setdefault(number // 2, error))
    for number, (index, example) in enumerate(good):
        if number in errors:
            _refused(errors[number].at(example.get("source", "example"), example.get("line", 0)), example, how, report)
            continue
        yield index, example, (side_of(tokens[2 * number]), side_of(tokens[2 * number + 1]))


def _refused(error: DataError, example: Mapping[str, Any], how: PairEncoding, report: Report) -> None:
    if how.on_bad_row == "error":
        raise error
    report.dropped(getattr(error, "reason", "template"), example, str(error))


def apart(example: Mapping[str, Any], how: PairEncoding) -> list[dict[str, Any]]:
    """The two conversations of a pair, each as a prompt with its completion."""
    kwargs = {**(how.chat_template_kwargs or {}), **(example.get("chat_template_kwargs") or {})}
    beside = {key: example[key] for key in ("tools", "source", "line") if example.get(key) is not None}
    beside |= {"chat_template_kwargs": kwargs} if kwargs else {}
    return [{"prompt": example["prompt"], "completion": example[side], **beside} for side in SIDES]


def side_of(tokens: Tokens) -> Side:
    """The conversation up to its last stop token, without the line break that many templates write behind it."""
    trained = [place for place, label in enumerate(tokens["labels"]) if label != IGNORE_INDEX]
    if not trained:
        return Side([], 0)
    return Side(tokens["input_ids"][: trained[-1] + 1], trained[0])


def fit_pair(
    index: int,
    example: Mapping[str, Any],
    sides: tuple[Side, Side],
    tokenizer: "PreTrainedTokenizerBase",
    how: PairEncoding,
    report: Report,
) -> Pair | None:
    """The pair within all limits; `None` for one that is dropped, which is then counted."""
    size = f"{len(sides[0].ids)} and {len(sides[1].ids)} tokens, max_length is {how.max_length}"
    fitted, reason = _limited(example, sides, tokenizer, how)
    if how.max_length is not None and longest(fitted) > how.max_length:
        fitted, reason = _shortened(example, fitted, tokenizer, how, size)
    if fitted is None:
        report.dropped(reason, example, size)
        return None
    chosen, rejected = (side.ids for side in fitted)
    if chosen == rejected:
        why = f"they differ only beyond the limits: {size}" if reason else "both answers are the same"
        report.dropped("no-difference" if reason else "equal-answers", example, why)
        return None
    if reason:
        report.changed(reason, example, size)
    return {
        "index": index,
        "chosen_input_ids": chosen,
        "rejected_input_ids": rejected,
        "first_difference": first_difference(chosen, rejected),
    }


def longest(sides: tuple[Side, Side]) -> int:
    """Tokens of the longer conversation."""
    return max(len(side.ids) for side in sides)


def first_difference(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """The first position whose tokens differ; where one conversation only goes on longer, the end of the other."""
    return next((at for at, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))


def _limited(
    example: Mapping[str, Any], sides: tuple[Side, Side], tokenizer: "PreTrainedTokenizerBase", how: PairEncoding
) -> tuple[tuple[Side, Side], str]:
    """Prompt and answers within their own limits, and the reason for the report if anything was cut."""
    found = []
    for ids, length in sides:
        prompt, answer = ids[:length], ids[length:][: how.max_target_length]
        if how.max_source_length is not None and length > how.max_source_length:
            prompt = cut_prompt(prompt, how.max_source_length, _header_length(example, tokenizer, how))
        found.append(Side(prompt + answer, len(prompt)))
    cut = any(len(new.ids) < len(old.ids) for new, old in zip(found, sides))
    return (found[0], found[1]), "cut" if cut else ""


def _header_length(example: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase", how: PairEncoding) -> int:
    """What a cut prompt keeps at its end; nothing where prompt and answers are texts."""
    chosen = apart(example, how)[0]
    if isinstance(chosen["prompt"], str):
        return 0
    options = {key: chosen.get(key) for key in ("tools", "chat_template_kwargs")}
    return header_length(chosen["prompt"], tokenizer, place_of(example), **options)


def _shortened(
    example: Mapping[str, Any],
    sides: tuple[Side, Side],
    tokenizer: "PreTrainedTokenizerBase",
    how: PairEncoding,
    size: str,
) -> tuple[tuple[Side, Side] | None, str]:
    """The pair within `max_length` tokens, the way `too_long` says, or `None`; and the reason for the report."""
    if how.too_long == "error":
        raise DataError(
            f"{place_of(example)}{size}. Raise max_length, shorten the row, or set too_long: drop, truncate, "
            "truncate_left or keep_last_turns."
        )
    if how.too_long == "truncate":
        chosen, rejected = (Side(ids[: how.max_length], length) for ids, length in sides)
        return (chosen, rejected), "cut"
    excess = longest(sides) - how.max_length
    if how.too_long == "truncate_left" and excess < min(side.prompt_length for side in sides):
        chosen, rejected = (Side(ids[excess:], length - excess) for ids, length in sides)
        return (chosen, rejected), "cut"
    shorter: Mapping[str, Any] | None = example
    while how.too_long == "keep_last_turns" and (shorter := drop_oldest_turns(shorter)) is not None:
        rendered = [render(one, tokenizer, train_on="completion") for one in apart(shorter, how)]
        chosen, rejected = (side_of(tokens) for tokens in tokenize(rendered, tokenizer))
        found, _ = _limited(shorter, (chosen, rejected), tokenizer, how)
        if longest(found) <= how.max_length:
            return found, "turns-dropped"
    return None, "too-long"


def token_rows(pair: Mapping[str, Any]) -> list[Tokens]:
    """Both conversations as `{input_ids, labels}`, labelled from the first difference on: for counts and previews."""
    begin = pair["first_difference"]
    sides = (list(pair[f"{side}_input_ids"]) for side in SIDES)
    return [{"input_ids": ids, "labels": [IGNORE_INDEX] * min(begin, len(ids)) + ids[begin:]} for ids in sides]


# Rows of other programs ----------------------------------------------------------------------------------------------


def preference(row: Row) -> dict[str, Any]:
    """A row in TRL's shapes as a preference example: `prompt`, `chosen`, `rejected` as texts, turns or one turn.

    Without `prompt` it is what both conversations share, less their answers. Texts stay texts.

    Raises: RowError with the place, the reason and the way to mend it.
    """
    try:
        example = _preference(row.value)
    except RowError as error:
        raise error.at(row.source, row.line) from None
    return {**example, "source": row.source, "line": row.line}


def _preference(value: Mapping[str, Any]) -> dict[str, Any]:
    for side in SIDES:
        if value.get(side) is None:
            found = ", ".join(map(str, value))
            raise RowError(f"'{side}' is missing; the row has {found}. Name both answers.", "missing-column")
    beside = {key: value[key] for key in ("tools", "chat_template_kwargs") if value.get(key)}
    prompt, chosen, rejected = value.get("prompt"), *(value[side] for side in SIDES)
    if isinstance(chosen, str) and isinstance(rejected, str) and isinstance(prompt, str):
        for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            if not text.strip():
                raise RowError(f"'{name}' is empty. Fill it or leave the row out.", "empty-answer")
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **beside}
    chosen, rejected = (_turns(answer, "assistant", side) for answer, side in zip((chosen, rejected), SIDES))
    if prompt is None:
        shared = first_difference(chosen, rejected)
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        if not shared:
            raise RowError("there is no prompt, and the two conversations share no turn. Add it.", "empty-prompt")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    else:
        prompt, chosen, rejected = without_prompt(_turns(prompt, "user", "prompt"), chosen, rejected)
    prompt = _turns(prompt, "user", "prompt")
    for answer in (chosen, rejected):
        check_turns([*prompt, *answer], last=len(answer))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **beside}


def _turns(value: Any, role: str, name: str) -> list[dict[str, Any]]:
    """A text, one turn or several as a list of turns with role and content."""
    turns = [{"role": role, "content": value}] if isinstance(value, str) else value
    turns = [turns] if isinstance(turns, Mapping) else turns
    if not isinstance(turns, list | tuple) or not turns:
        raise RowError(f"'{name}' is {kind_of(value)}; expected a text or turns.", "bad-content")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise RowError(f"turn {number} of '{name}' has no role. Give turns role and content.", "unknown-role")
        if not isinstance(turn.get("content"), str) and not any(turn.get(key) for key in CALLS):
            raise RowError(f"turn {number} of '{name}' has no content. Write a text.", "bad-content")
    return [{**with_tool_calls(turn, n), "content": turn.get("content") or ""} for n, turn in enumerate(turns, 1)]
