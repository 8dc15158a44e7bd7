"""Examples → token rows that fit: rendered, tokenized, cut or dropped, a batch at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.data.chat_template import place_of
from tunesmith.data.normalize import Example
from tunesmith.data.render import Rendered, drop_oldest_turns, render, render_prompt
from tunesmith.data.report import Report, count_trained
from tunesmith.data.rows import RowError
from tunesmith.data.tokenize import Tokens, encode_straight, encoder_of, tokenize, truncate
from tunesmith.data.turn_limits import Limits, find_turns, fits, has_turns, limited
from tunesmith.errors import ConfigError, DataError, TemplateError

if TYPE_CHECKING:
    from tokenizers import Encoding as TextEncoding
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.normalize import Message


@dataclass(frozen=True)
class Encoding:
    """How examples become tokens: the training options of these names."""

    train_on: str = "assistant"
    too_long: str = "drop"
    max_length: int | None = None
    """`None`: any length."""
    on_bad_row: str = "error"
    append_eos: bool = True
    add_special_tokens: bool = True
    """Of plain text: what the tokenizer puts around every text, such as BOS."""
    label_with: Callable[[list[int]], list[int]] | None = None
    """Ids → labels, in place of those that `train_on` gives."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Variables of the template; an example's own win."""
    max_source_length: int | None = None
    """Tokens of what stands before an answer, see `turn_limits`. `None`: any number."""
    max_target_length: int | None = None
    """Tokens of an answer. `None`: any number."""
    unweighed: str = ""
    """The argument whose loss or batches know nothing of weights, if there is one."""

    def render(self, example: Example, tokenizer: "PreTrainedTokenizerBase") -> Rendered:
        """`render.render` with these options."""
        return render(
            example,
            tokenizer,
            train_on=self.train_on,
            append_eos=self.append_eos,
            add_special_tokens=self.add_special_tokens,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def render_prompt(
        self, messages: Sequence["Message"], example: Example, tokenizer: "PreTrainedTokenizerBase"
    ) -> Rendered:
        """The beginning of the example's conversation up to its next answer, with these options."""
        return render_prompt(
            messages,
            tokenizer,
            tools=example.get("tools"),
            where=place_of(example),
            chat_template_kwargs={**(self.chat_template_kwargs or {}), **(example.get("chat_template_kwargs") or {})},
        )

    @property
    def limits(self) -> Limits | None:
        """Those of turns, if there are any."""
        if self.max_source_length is None and self.max_target_length is None:
            return None
        return Limits(self.max_source_length, self.max_target_length, self.max_length)


class Encoded(NamedTuple):
    """What became of one example of a batch."""

    index: int
    tokens: Tokens


def encode_batch(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", how: Encoding, report: Report
) -> list[Encoded]:
    """The examples that are trained on, as tokens, in their order.

    Args:
        report: every row that is dropped or changed is counted there, and the rows and tokens of those kept.

    Raises: RowError, TemplateError for an example that cannot be labelled exactly, unless skipped; DataError for one
        that is too long under `too_long="error"`.
    """
    rows = rendered_rows(examples, tokenizer, how, report)
    encoder = encoder_of(tokenizer) if tokenizer.is_fast else None
    straight = encode_straight([row for _, row in rows], encoder)
    return labelled_rows(examples, rows, straight, tokenizer, how, report)


def rendered_rows(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", how: Encoding, report: Report
) -> list[tuple[int, Rendered]]:
    """Each example's index and text; bad ones raise or are counted."""
    rows: list[tuple[int, Rendered]] = []
    for index, example in enumerate(examples):
        try:
            rows.append((index, how.render(example, tokenizer)))
        except (RowError, TemplateError) as error:
            if how.on_bad_row == "error":
                raise
            report.dropped(getattr(error, "reason", "template"), example, str(error))
    return rows


def labelled_rows(
    examples: Sequence[Example],
    rows: Sequence[tuple[int, Rendered]],
    straight: "Sequence[TextEncoding]",
    tokenizer: "PreTrainedTokenizerBase",
    how: Encoding,
    report: Report,
) -> list[Encoded]:
    """The rendered rows with labels, within all limits; bad ones raise or are counted, and so is what is kept."""
    failed: set[int] = set()
    split: set[int] = set()

    def on_error(number: int, error: RowError) -> None:
        example = examples[rows[number][0]]
        if how.on_bad_row == "error":
            raise error.at(example.get("source", "example"), example.get("line", number + 1))
        failed.add(number)
        report.dropped(error.reason, example, str(error))

    kept = []
    found = tokenize([row for _, row in rows], tokenizer, lambda number, _: split.add(number), on_error, straight)
    for number, ((index, row), tokens) in enumerate(zip(rows, found)):
        if "weights" in tokens:
            check_weighed(how.unweighed, place_of(examples[index]))
        fitted = None if number in failed else fit(examples[index], tokens, tokenizer, how, report)
        if fitted is not None:
            kept.append(Encoded(index, fitted))
            if number in split:
                what = "the answer's first token is not merged with the prompt's last"
                report.changed("split-at-boundary", examples[index], what)
            if row.left_out:
                what = f"{row.left_out} earlier turns, which the template does not write"
                report.changed("history-left-out", examples[index], what)
            if row.unwritten:
                what = f"{row.unwritten}, which the template does not write"
                report.changed("thoughts-left-out", examples[index], what)
    report.add_tokens(tokens for _, tokens in kept)
    report.kept += len(kept)
    return kept


def fit(
    example: Example, tokens: Tokens, tokenizer: "PreTrainedTokenizerBase", how: Encoding, report: Report
) -> Tokens | None:
    """The tokens within all limits and labelled; `None` for a row that is dropped, which is then counted."""
    whole = tokens
    try:
        tokens, cuts = _with_short_turns(example, tokens, tokenizer, how)
    except (RowError, TemplateError) as error:
        if how.on_bad_row == "error":
            raise
        report.dropped(getattr(error, "reason", "template"), example, str(error))
        return None
    fitted, reason, size = tokens, "", f"{len(tokens['input_ids'])} tokens, max_length is {how.max_length}"
    if how.max_length is not None and len(tokens["input_ids"]) > how.max_length:
        fitted, reason = _shortened(example, tokens, tokenizer, how, size)
    if fitted is None:
        report.dropped(reason, example, size)
        return None
    if how.label_with is not None:
        fitted = {**fitted, "labels": own_labels(example, fitted["input_ids"], how.label_with)}
    cuts |= {reason: size} if reason else {}
    if trains(fitted["labels"]):
        for what, detail in cuts.items():
            report.changed(what, example, detail)
        return fitted
    if how.label_with is not None:
        why = "the collator's template does not occur in it" + (", or was cut off" if reason else "")
        report.dropped("no-trained-token", example, why)
    elif cuts and trains(whole["labels"]):
        report.dropped("truncated", example, f"what would be trained is cut off: {'; '.join(cuts.values())}")
    else:
        report.dropped("no-trained-token", example)
    return None


def trains(labels: list[int]) -> bool:
    """Whether the loss covers any token."""
    return count_trained(labels) > 0


def _with_short_turns(
    example: Example, tokens: Tokens, tokenizer: "PreTrainedTokenizerBase", how: Encoding
) -> tuple[Tokens, dict[str, str]]:
    """The tokens with sources and targets cut, and what was done: reason → detail."""
    limits = how.limits
    if limits is None or not has_turns(example, how.train_on) or fits(tokens, limits):
        return tokens, {}
    rendered = how.render(example, tokenizer)
    turns = find_turns(
        example, rendered, tokens, tokenizer, how.train_on, lambda some: how.render_prompt(some, example, tokenizer)
    )
    return limited(tokens, turns, limits)


def own_labels(example: Example, ids: list[int], label_with: Callable[[list[int]], list[int]]) -> list[int]:
    """Labels by a person's function, whose errors know nothing of rows."""
    try:
        return label_with(ids)
    except DataError as error:
        error.args = (f"{place_of(example)}{error}", *error.args[1:])
        raise


def _shortened(
    example: Example, tokens: Tokens, tokenizer: "PreTrainedTokenizerBase", how: Encoding, size: str
) -> tuple[Tokens | None, str]:
    """The example within `max_length` tokens, the way `too_long` says, or `None`; and the reason for the report."""
    if how.too_long == "error":
        raise DataError(
            f"{place_of(example)}{size}. Raise max_length, shorten the row, or set too_long: drop, truncate, "
            "truncate_left or keep_last_turns."
        )
    if how.too_long in ("truncate", "truncate_left"):
        return truncate(tokens, how.max_length, "left" if how.too_long == "truncate_left" else "right"), "cut"
    shorter: Example | None = example
    keeps_last = how.too_long == "keep_last_turns" and how.limits is None  # which keep the first turns
    while keeps_last and (shorter := drop_oldest_turns(shorter)) is not None:
        found = tokenize([how.render(shorter, tokenizer)], tokenizer)[0]
        if len(found["input_ids"]) <= how.max_length:
            return found, "turns-dropped"
    return None, "too-long"


def check_weighed(unweighed: str, where: str) -> None:
    """Raise ConfigError for weights of tokens that the argument `unweighed` would leave out of the loss."""
    ways = {
        "compute_loss_func": "a compute_loss of a subclass sees them as loss_weights",
        "data_collator": "with remove_unused_columns=False it may put them into its batch, weights (B, S)",
    }
    if unweighed:
        raise ConfigError(
            f"{where}the row has a weight, of which {unweighed} knows nothing. Take the weight out, or leave "
            f"{unweighed} out; {ways[unweighed]}."
        )
