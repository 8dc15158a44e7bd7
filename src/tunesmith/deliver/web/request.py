"""The body of an OpenAI-style request → what is asked of the model; what cannot be honoured is refused by name."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tunesmith.data.formats import OWN_ARGUMENTS, kind_of
from tunesmith.data.normalize import ROLES, is_call
from tunesmith.data.report import visible
from tunesmith.deliver.web.access import Refused
from tunesmith.lookup import did_you_mean

CHAT_ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_KEYS = ("content", "tool_calls", "tool_call_id", "name", "reasoning_content")
MAX_STOPS = 16
LEAST_TEMPERATURE = 0.01  # below it the likeliest token has all the probability, and logits overflow

READ = (
    "model", "messages", "prompt", "stream", "stream_options", "temperature", "top_p", "top_k", "repetition_penalty",
    "max_tokens", "max_completion_tokens", "stop", "seed", "tools", "tool_choice", "chat_template_kwargs",
)  # fmt: skip
# said for a provider's bookkeeping: they change no answer
WITHOUT_EFFECT = (
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
)  # fmt: skip
# options that are not there, with the values that ask for nothing
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
}


class Question(NamedTuple):
    """What a client asks."""

    messages: list[dict[str, Any]]
    """Empty where `prompt` is to be continued."""
    prompt: str | None
    tools: list[dict[str, Any]] | None
    template_kwargs: dict[str, Any] | None
    decoding: dict[str, Any]
    """Decoding options that the request sets."""
    stop: list[str]
    seed: int | None
    is_streamed: bool
    counts_usage: bool
    """Whether a stream ends with the token counts."""


def read_question(body: Mapping[str, Any], name: str, *, is_chat: bool) -> Question:
    """Check the body of a request to the model called `name`.

    Raises: Refused with the key and what was expected.
    """
    check_keys(body)
    if body.get("model") not in (None, "", name):
        raise Refused(
            404,
            f"This server serves '{name}', not '{visible(str(body['model']), 80)}'.",
            param="model",
            code="model_not_found",
        )
    is_streamed = _boolean(body, "stream")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise _wrong("stream_options", options, "an object")
    return Question(
        messages=read_messages(body.get("messages")) if is_chat else [],
        prompt=None if is_chat else read_prompt(body.get("prompt")),
        tools=read_tools(body) if is_chat else None,
        template_kwargs=read_template_kwargs(body.get("chat_template_kwargs")),
        decoding=read_decoding(body),
        stop=read_stop(body.get("stop")),
        seed=_number(body, "seed", int, -(2**63), 2**63 - 1),
        is_streamed=is_streamed,
        counts_usage=bool(options.get("include_usage")),
    )


def check_keys(body: Mapping[str, Any]) -> None:
    """Refuse keys that nobody knows, and options that would be ignored."""
    for key, value in body.items():
        if key in UNSUPPORTED and value is not None and value not in UNSUPPORTED[key]:
            raise Refused(
                400, f"{key} is {visible(repr(value), 60)}; this server knows only {UNSUPPORTED[key][0]!r}.", param=key
            )
        if key not in READ and key not in WITHOUT_EFFECT and key not in UNSUPPORTED:
            hint = did_you_mean(key, READ)
            raise Refused(400, f"Unknown option '{visible(key, 60)}'.{hint}", param=visible(key, 60))


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """The turns as templates read them."""
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", messages, "a list with at least one message")
    return [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _wrong(where, message, "an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in CHAT_ROLES:
        hint = did_you_mean(str(role), CHAT_ROLES)
        known = ", ".join(CHAT_ROLES)
        raise Refused(400, f"{where}.role is {visible(repr(role), 40)}.{hint} Known: {known}.", param=f"{where}.role")
    kept = {key: message[key] for key in MESSAGE_KEYS if message.get(key) is not None}
    calls = kept.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(is_call(call) for call in calls)):
        raise _wrong(f"{where}.tool_calls", calls, "a list of calls, each a function with a name")
    if "content" not in kept and not calls:
        raise _wrong(f"{where}.content", None, "a text")
    return {**kept, "role": ROLES[role], "content": _text(kept.get("content", ""), f"{where}.content")}


def _text(content: Any, where: str) -> str:
    """A text, or the text of content parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(where, content, "a text")
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise Refused(400, f"{where} holds something other than text; this server reads only text.", param=where)
    return "".join(texts)


def read_prompt(prompt: Any) -> str:
    """The text to be continued."""
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise _wrong("prompt", prompt, "a text")
    return prompt


def read_tools(body: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The functions that the template may write into the prompt."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        what = f"tool_choice is {visible(repr(choice), 60)}"
        raise Refused(400, f"{what}; the model itself decides here: 'auto' or 'none'.", param="tool_choice")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _wrong("tools", tools, "a list of objects")
    return tools if tools and choice != "none" else None


def read_template_kwargs(kwargs: Any) -> dict[str, Any] | None:
    """Variables of the template; not what the renderer sets itself."""
    if kwargs is not None and not isinstance(kwargs, dict):
        raise _wrong("chat_template_kwargs", kwargs, "an object")
    for name in kwargs or {}:
        if name in OWN_ARGUMENTS:
            raise Refused(400, f"chat_template_kwargs: '{name}' is set by the server.", param="chat_template_kwargs")
    return kwargs


def read_decoding(body: Mapping[str, Any]) -> dict[str, Any]:
    """Decoding options that the request sets. A temperature of 0 is greedy; a higher one samples, so does `top_p`."""
    temperature = _number(body, "temperature", float, 0, 2)
    found = {
        "max_new_tokens": _number(body, "max_completion_tokens", int, 1) or _number(body, "max_tokens", int, 1),
        "top_p": _number(body, "top_p", float, 0, 1),
        "top_k": _number(body, "top_k", int, 0),
        "repetition_penalty": _number(body, "repetition_penalty", float, 0.01, 10),
    }
    if found["top_p"] == 0:
        raise _wrong("top_p", 0, "a number above 0, up to 1")
    if temperature is not None and temperature < LEAST_TEMPERATURE:
        found |= {"do_sample": False}
    elif temperature is not None or (found["top_p"] or 1) < 1:
        found |= {"do_sample": True, "temperature": temperature}
    return {key: value for key, value in found.items() if value is not None}


def read_stop(stop: Any) -> list[str]:
    """Texts that end the answer."""
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(text, str) for text in stops):
        raise _wrong("stop", stop, f"a text, or a list of up to {MAX_STOPS}")
    return [text for text in stops if text]


def _boolean(body: Mapping[str, Any], key: str) -> bool:
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise _wrong(key, value, "true or false")
    return bool(value)


def _number(body: Mapping[str, Any], key: str, kind: type, low: float, high: float | None = None) -> Any:
    """The number under `key`, or None where there is none."""
    value = body.get(key)
    if value is None:
        return None
    is_number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not is_number or not low <= value <= (value if high is None else high):
        noun = "a whole number" if kind is int else "a number"
        raise _wrong(key, value, f"{noun} from {low} on" if high is None else f"{noun} from {low} to {high}")
    return kind(value)


def _wrong(key: str, value: Any, expected: str) -> Refused:
    found = "missing" if value is None else repr(value) if isinstance(value, int | float | str) else kind_of(value)
    return Refused(400, f"{key} is {visible(found, 60)}; expected {expected}.", param=key)
