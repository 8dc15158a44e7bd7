"""A chat template bound to a tokenizer: conversations in, text out, and errors that name the row."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tunesmith.data.formats import INSTRUCTING, OWN_ARGUMENTS
from tunesmith.data.report import place
from tunesmith.errors import ConfigError, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.normalize import Example

NO_HISTORY = re.compile(r"\{#-?\s*use_history: false\s*-?#\}")  # a comment in templates that drop earlier exchanges
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ARGUMENTS: WeakKeyDictionary = WeakKeyDictionary()  # tokenizer → template → which kinds of arguments it takes


def place_of(example: "Example") -> str:
    """The place of an example as errors begin with it, or nothing."""
    return f"{place(example['source'], example.get('line', 0))}: " if example.get("source") else ""


def refusal(where: str, what: str, reason: str = "template") -> TemplateError:
    """A TemplateError that carries a report reason, so that a caller may skip the row and count it."""
    error = TemplateError(f"{where}{what}.")
    error.reason = reason
    return error


@cache
def marks_answers(template: str) -> bool:
    """Whether the template has `{% generation %}`; templates are long, and asked about for each row."""
    return GENERATION_TAG.search(template) is not None


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
        """The tokenizer's template, or `chat_template`; `where` begins every error.

        Raises: ConfigError for `kwargs` that are not the template's to know; TemplateError without a template.
        """
        if ours := sorted(OWN_ARGUMENTS & (kwargs or {}).keys()):
            raise ConfigError(f"chat_template_kwargs: {', '.join(ours)} is set by tunesmith itself. Leave it out.")
        tools = tools or None
        if not (chat_template or tokenizer.chat_template):
            raise refusal(
                where,
                "the tokenizer has no chat template, so messages cannot be rendered. Set chat_template: to a Jinja "
                "file or a name (default, alpaca and vicuna need no special tokens), or take a model that has one "
                "(names of chat models often end in -Instruct)",
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

    def marked_text(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]] | None]:
        """The conversation as the template writes it, and the character ranges inside `{% generation %}` blocks.

        `None` for a template without such blocks.
        """
        if not marks_answers(self.template):
            return self.text(messages), None
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

    def within_reach(self, messages: list[dict]) -> tuple[list[dict], int]:
        """The turns that the template writes, and how many it leaves out: earlier exchanges, if it drops the history.

        An instructing turn is kept: the template writes it, or the row is refused.
        """
        asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not asked or not NO_HISTORY.search(self.template):
            return messages, 0
        head = 1 if messages[0]["role"] in INSTRUCTING else 0
        return messages[:head] + messages[asked[-1] :], max(0, asked[-1] - head)

    def with_arguments(self, messages: list[dict]) -> list[dict]:
        """The turns with the arguments of their tool calls as this template takes them: an object, or its JSON text.

        OpenAI's files hold text. Most templates write `arguments | tojson`, which would quote it a second time; others
        join it to a text, which an object breaks.
        """
        if not any(message.get("tool_calls") for message in messages):
            return messages
        kinds = _ARGUMENTS.setdefault(self.tokenizer, {})
        if self.template not in kinds:
            kinds[self.template] = _argument_kinds(replace(self, tools=None, kwargs={}))
        if all(kinds[self.template]):
            return messages
        return [_with_arguments(message, *kinds[self.template]) for message in messages]

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


def _argument_kinds(chat: Chat) -> tuple[bool, bool]:
    """Whether the template writes arguments that are text as they are, and objects as JSON or tags."""
    takes_text = '{"key": "value"}' in _probed(chat, '{"key": "value"}')
    of_object = _probed(chat, {"key": "value"})
    takes_object = "value" in of_object and "'value'" not in of_object  # Python's quotes: written without tojson
    return (takes_text, takes_object) if takes_text or takes_object else (True, True)


def _probed(chat: Chat, arguments: Any) -> str:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
    try:
        return chat.text(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        )
    except TemplateError:  # the row itself will tell
        return ""


def _with_arguments(message: dict, takes_text: bool, takes_object: bool) -> dict:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_converted(call, takes_text, takes_object) for call in calls]}


def _converted(call: Any, takes_text: bool, takes_object: bool) -> Any:
    """The call with its arguments as text or as an object; one that is neither, or no JSON, as it is."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    arguments = function.get("arguments")
    if isinstance(arguments, dict) and not takes_object:
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif isinstance(arguments, str) and not takes_text:
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return call
        arguments = parsed if isinstance(parsed, dict) else arguments
    else:
        return call
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function
