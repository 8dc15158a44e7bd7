"""A chat template bound to a tokenizer: conversations in, text out, and errors that name the row."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunesmith.data.report import place
from tunesmith.errors import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.normalize import Example


def place_of(example: "Example") -> str:
    """The place of an example as errors begin with it, or nothing."""
    return f"{place(example['source'], example.get('line', 0))}: " if example.get("source") else ""


def refusal(where: str, what: str, reason: str = "template") -> TemplateError:
    """A TemplateError that carries a report reason, so that a caller may skip the row and count it."""
    error = TemplateError(f"{where}{what}.")
    error.reason = reason
    return error


@dataclass(frozen=True)
class Chat:
    """A template bound to a tokenizer, the tools of one example and the place to name in errors."""

    tokenizer: "PreTrainedTokenizerBase"
    template: str
    tools: list[dict] | None
    where: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template, e.g. `{"enable_thinking": False}`."""

    @classmethod
    def of(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        chat_template: str | None,
        tools: list[dict] | None,
        where: str,
        kwargs: Mapping[str, Any] | None = None,
    ) -> "Chat":
        """The tokenizer's template, or `chat_template`; `where` begins every error."""
        tools = tools or None
        if not (chat_template or tokenizer.chat_template):
            raise refusal(
                where,
                "the tokenizer has no chat template, so messages cannot be rendered. Set chat_template: to a Jinja "
                "file, or take a model that has one (names of chat models often end in -Instruct)",
            )
        try:
            template = tokenizer.get_chat_template(chat_template, tools)
        except ValueError as error:
            raise refusal(where, str(error)) from error
        return cls(tokenizer, template, tools, where, kwargs or {})

    def text(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """The conversation as the template writes it."""
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=self.tools,
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self.kwargs,
            )
        except Exception as error:  # a template is a foreign program: it may raise anything
            raise self.failed(error) from error

    def generation_ranges(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as the template writes it, and the character ranges inside `{% generation %}` blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, ranges = render_jinja_template(
                conversations=[messages],
                tools=self.tools,
                chat_template=self.template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
                **self.kwargs,
            )
        except Exception as error:  # as above
            raise self.failed(error) from error
        return texts[0], ranges[0]

    def failed(self, error: Exception) -> TemplateError:
        """What the template itself raised."""
        kind = "" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: "
        return refusal(
            self.where,
            f"the chat template refuses this conversation: {kind}{str(error).rstrip('.')}. Change the row, or set "
            "chat_template: to a template that accepts it",
        )

    def refusal(self, what: str, reason: str = "template") -> TemplateError:
        """`what` is wrong with this conversation under this template."""
        return refusal(self.where, what, reason)
