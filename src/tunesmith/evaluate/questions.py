"""An example → what the model is asked, as it reads it, and the answer that is expected."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.data import IGNORE_INDEX
from tunesmith.data.chat_template import place_of
from tunesmith.data.render import Rendered, for_template, render
from tunesmith.data.tokenize import tokenize
from tunesmith.data.turn_limits import cut_prompt, header_length
from tunesmith.errors import DataError
from tunesmith.evaluate.generate import Prompt, encode_prompt, encode_rendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Question(NamedTuple):
    """What the model is asked, and the answer the example holds."""

    prompt: Prompt
    """As the model reads it."""
    label: str | None
    """None where the example has no answer."""
    asked: str
    """What a person wrote last, for tables."""
    messages: Sequence[Mapping[str, Any]] = ()
    """What the prompt was rendered from; none where it is a text as it stands."""
    options: Mapping[str, Any] = {}
    """How it was rendered: arguments of `render_prompt`."""


def ask(
    example: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    chat_template: str | None = None,
    index: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Question:
    """The prompt of an example, rendered as in training, and its label.

    Prompt and completion strings become a user and an assistant turn where there is a chat template, as they do in
    training; without one they are read as they are. The example's own `chat_template_kwargs` win over those given.
    """
    where = place_of(example) or f"example {index}: "
    if example.get("text") is not None:
        raise DataError(
            f"{where}plain text has no prompt and no answer. Predict from rows with messages or with "
            "prompt and completion; `tunesmith eval` gives the loss of plain text."
        )
    prompt, completion = example.get("prompt"), example.get("completion")
    has_template = bool(chat_template or tokenizer.chat_template)
    if isinstance(prompt, str) and not has_template:
        return Question(encode_rendered(tokenizer, Rendered(prompt, [], add_bos=True), where), completion, prompt)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    messages = example.get("messages") if prompt is None else [*prompt, *(completion or [])]
    if not messages:
        raise DataError(f"{where}there are neither messages nor a prompt, so there is nothing to answer.")
    first = None if prompt is None else len(prompt)
    kwargs = {**(chat_template_kwargs or {}), **(example.get("chat_template_kwargs") or {})}
    beside = {
        key: value for key, value in (("tools", example.get("tools")), ("chat_template_kwargs", kwargs)) if value
    }
    return _ask_messages(messages, first, beside, tokenizer, chat_template, where)


def expected_texts(examples: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The answers that examples hold, as they are written there: for `metrics_for(..., references=...)`."""
    for example in examples:
        turns = example.get("completion") or example.get("messages") or ""
        if isinstance(turns, str):
            yield turns
        else:
            yield next((_content(turn) for turn in reversed(turns) if turn["role"] == "assistant"), "")


def _ask_messages(
    messages: Sequence[Mapping[str, Any]],
    first: int | None,
    beside: dict[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    chat_template: str | None,
    where: str,
) -> Question:
    """`first`: index of the completion's first message, if there is one. `beside`: tools, chat_template_kwargs."""
    plain = [for_template(message) for message in messages]
    answers = [
        place for place, message in enumerate(plain) if message["role"] == "assistant" and place >= (first or 0)
    ]
    end = answers[-1] if answers else len(plain)
    options = {"chat_template": chat_template, "where": where, **beside}
    prompt = encode_prompt(tokenizer, plain[:end], **options)
    label = _label(plain[: end + 1], beside, tokenizer, chat_template) if answers else None
    asked = [message for message in plain[:end] if message["role"] != "assistant"]
    return Question(prompt, label, _content(asked[-1]) if asked else prompt.text, plain[:end], options)


def _label(
    messages: list[dict[str, Any]],
    beside: dict[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    chat_template: str | None,
) -> str:
    """The last message as the model should write it: its content, or with tool calls what training makes of it."""
    last = messages[-1]
    if isinstance(last.get("content"), str) and not last.get("tool_calls"):
        return last["content"]
    example = {"messages": messages, **beside}
    try:
        rendered = render(example, tokenizer, train_on="last_turn", chat_template=chat_template)
        labels = tokenize([rendered], tokenizer)[0]["labels"]
    except DataError:  # nothing that could be trained; the prompt can be answered all the same
        return _content(last) or json.dumps(last.get("tool_calls"), ensure_ascii=False)
    ids = [label for label in labels if label != IGNORE_INDEX]
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def _content(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))


# ---- length ---------------------------------------------------------------------------------------------------------


def fitted(
    questions: Sequence[Question],
    tokenizer: "PreTrainedTokenizerBase",
    max_source_length: int | None,
    limit: int | None,
    examples: Sequence[Mapping[str, Any]],
) -> tuple[list[Question], int]:
    """The questions with prompts of at most `max_source_length` tokens, and how many were cut.

    Raises: DataError for a prompt that leaves no room for an answer within the model's `limit`, with its place.
    """
    found = []
    for question in questions:
        is_long = max_source_length is not None and len(question.prompt.input_ids) > max_source_length
        found.append(cut_question(question, tokenizer, max_source_length) if is_long else question)
    for index, question in enumerate(found):
        length = len(question.prompt.input_ids)
        if limit is not None and length >= limit:
            where = place_of(examples[index]) or f"example {index}: "
            raise DataError(
                f"{where}its prompt has {length} tokens, but the model reads {limit} at most, the answer included. "
                "Set max_source_length to cut such prompts, or leave the row out."
            )
    cut = sum(one is not other for one, other in zip(questions, found, strict=True))
    if cut:
        logger.warning(
            "%d of %d prompts were cut to %d tokens (max_source_length).", cut, len(found), max_source_length
        )
    return found, cut


def cut_question(question: Question, tokenizer: "PreTrainedTokenizerBase", length: int) -> Question:
    """The question with its prompt cut as training cuts it: what the template writes behind the last message stays.

    LLaMA-Factory cuts the prompt's last tokens, and with them the header that tells the model to answer.

    Raises: RowError, DataError as `header_length` and `cut_prompt`.
    """
    header = header_length(question.messages, tokenizer, **question.options) if question.messages else 0
    kept = cut_prompt(question.prompt.input_ids, length, header)
    shown = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return question._replace(prompt=Prompt(shown, kept))
