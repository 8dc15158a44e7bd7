"""An Ollama Modelfile: the GGUF file, and the chat template as Ollama's language says it.

    chat template ── rendered around marks ──► what stands before and behind each message ──► TEMPLATE

A template is only written if, put together from these parts, it gives what the chat template gives, token for token.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

SYSTEM, USER, ANSWER = "\x01system\x01", "\x01user\x01", "\x01answer\x01"
"""Marks that no template contains."""
TRIALS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "Hi"),),
    (("system", "Be brief."), ("user", "Hi")),
    (("user", "a"), ("assistant", "b"), ("user", "c")),
    (("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")),
)
"""Conversations that the parts must render as the chat template does."""


class Parts(NamedTuple):
    """What a chat template writes around messages."""

    alone: str
    """At the beginning of a conversation without a system message."""
    system: tuple[str, str]
    user: tuple[str, str]
    answer: tuple[str, str]
    asks: str
    """Behind the last message, where the model is to write."""

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """The prompt for `messages`."""
        around = {"system": self.system, "user": self.user, "assistant": self.answer}
        begin = "" if messages[0][0] == "system" else self.alone
        return begin + "".join(f"{around[role][0]}{text}{around[role][1]}" for role, text in messages) + self.asks


def modelfile(gguf_name: str, tokenizer: Any, stops: Sequence[str], system: str | None = None) -> tuple[str, str]:
    """The text of a Modelfile, and what is to be said of its template, if anything.

    Args:
        gguf_name: the GGUF file beside it.
        stops: texts at which an answer ends.
        system: the system message of conversations that bring none.
    """
    parts = parts_of(tokenizer) if tokenizer.chat_template else None
    lines = [f"FROM ./{gguf_name}"]
    if parts is not None:
        lines.append(f'TEMPLATE """{template(parts)}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    said = []
    if parts is None and tokenizer.chat_template:
        said.append("the chat template cannot be said in Ollama's language, which will look for one it knows")
    if system and '"""' in system:
        said.append("the system message is left out: a Modelfile cannot quote three quotation marks")
    elif system:
        lines.append(f'SYSTEM """{system}"""')
    return "\n".join(lines) + "\n", "; ".join(said)


def template(parts: Parts) -> str:
    """The parts in Ollama's language, which is that of Go's text/template."""
    return "".join(
        (
            "{{ if .System }}" + "{{ .System }}".join(parts.system) + "{{ else }}" + parts.alone + "{{ end }}",
            "{{ range .Messages }}",
            '{{ if eq .Role "user" }}' + "{{ .Content }}".join(parts.user),
            '{{ else if eq .Role "assistant" }}' + "{{ .Content }}".join(parts.answer),
            "{{ end }}{{ end }}",
            parts.asks,
        )
    )


def parts_of(tokenizer: Any) -> Parts | None:
    """The parts of a chat template; `None` where it does more than write around messages, or one cannot be quoted."""
    try:
        parts = found_parts(tokenizer)
        same = all(parts.render(trial) == rendered(tokenizer, trial) for trial in TRIALS)
    except Exception:  # a template may raise for a role it does not know, or whatever it likes
        return None
    text = "".join((parts.alone, *parts.system, *parts.user, *parts.answer, parts.asks))
    return parts if same and '"""' not in text and "{{" not in text else None


def found_parts(tokenizer: Any) -> Parts:
    """What stands around the marks of one conversation. Raises: ValueError where a mark does not come out."""
    turns = (("system", SYSTEM), ("user", USER), ("assistant", ANSWER), ("user", USER))
    before_system, rest = rendered(tokenizer, turns).split(SYSTEM)
    between, after_user, end = rest.split(USER)
    after_user, after_answer = after_user.split(ANSWER)
    # where a conversation ends after a message, only the end of that message stands behind it
    end_of_user = rendered(tokenizer, turns[:2], asks=False).split(USER)[1]
    end_of_answer = rendered(tokenizer, turns[:3], asks=False).split(ANSWER)[1]
    begin_of_user = after_answer.removeprefix(end_of_answer)
    return Parts(
        alone=rendered(tokenizer, turns[1:2]).split(USER)[0].removesuffix(begin_of_user),
        system=(before_system, between.removesuffix(begin_of_user)),
        user=(begin_of_user, end_of_user),
        answer=(after_user.removeprefix(end_of_user), end_of_answer),
        asks=end.removeprefix(end_of_user),
    )


def rendered(tokenizer: Any, messages: Sequence[tuple[str, str]], *, asks: bool = True) -> str:
    """What the chat template makes of `messages`."""
    said = [{"role": role, "content": text} for role, text in messages]
    return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=asks)
