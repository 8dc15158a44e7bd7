"""What a chat template writes around each turn, as a few short texts, and the Jinja that they make.

Most families differ in these texts only. `{% generation %}` stands around what the model has to write, so the mask
comes from the template and not from a search.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "jinja"  # templates with logic of their own
NO_HISTORY = "{#- use_history: false #}"  # `Chat.within_reach` reads it
FIELD = re.compile(r"\{(content|system|stripped_system|round|bos|eos)\}")
VALUES = {
    "content": "content",
    "system": "system",
    "stripped_system": "system | trim",
    "round": "(loop.index0 // 2) | string",
    "bos": "(bos_token or '')",
    "eos": "(eos_token or '')",
}


@dataclass(frozen=True)
class Template:
    """A chat template: the texts around turns, and the tokens they need.

    Texts may hold `{content}` of the turn, `{system}` or `{stripped_system}`, `{bos}`, `{eos}`, and `{round}`, the
    exchange's number from 0.
    """

    about: str
    """For whom it is, in a line."""
    user: str = "{content}"
    """A question."""
    header: str = ""
    """Before an answer; generation goes on behind it."""
    answer: str = "{content}{eos}"
    """What the model writes, its end included; trained."""
    after: str = ""
    """Behind an answer, not trained."""
    between: str = ""
    """Before every question but the first."""
    start: str = "{bos}"
    """Before everything."""
    system: str = ""
    """The system text, where there is one. Empty: system turns are refused."""
    default_system: str = ""
    """System text of conversations that bring none."""
    always_system: bool = False
    """Write `system` even around no text."""
    fuse_system: bool = False
    """`system` is put in front of the first question's content."""
    trim: bool = False
    """Turns lose white space at both ends."""
    alternates: bool = False
    """Refuse two turns in a row of one role."""
    use_history: bool = True
    """False: only the last exchange is written."""
    bos_by_habit: bool = False
    """`{bos}` is written only if the tokenizer puts BOS in front of texts, too."""
    tokens: tuple[str, ...] = ()
    """Control tokens that it writes: each is one id if the tokenizer fits."""
    eos: str | None = None
    """Stop token that replaces the tokenizer's; one of `tokens`."""
    file: str | None = None
    """Jinja file in place of the texts; it may read `system`."""

    @property
    def jinja(self) -> str:
        """The template as a tokenizer holds it."""
        default = f"{{%- set system = {quoted(self.default_system)} %}}\n"
        if self.file is not None:
            return default + (FOLDER / self.file).read_text(encoding="utf-8").strip()
        return default + "\n".join([*self._beginning(), *self._turns(), *self._prompt()])

    def _beginning(self) -> Iterator[str]:
        """Up to the first turn."""
        yield "{%- set turns = messages %}"
        if self.system:
            yield "{%- if messages[0].role == 'system' %}"
            yield "    {%- set system = messages[0].content or system %}"
            yield "    {%- set turns = messages[1:] %}"
            yield "{%- endif %}"
        if not self.use_history:
            yield NO_HISTORY
            yield "{%- set last = namespace(question=0) %}"
            yield "{%- for message in turns %}"
            yield "    {%- if message.role == 'user' %}{%- set last.question = loop.index0 %}{%- endif %}"
            yield "{%- endfor %}"
            yield "{%- set turns = turns[last.question:] %}"
        if self.start:
            yield f"{{{{- {expression(self.start)} }}}}"
        if self.system and not self.fuse_system:
            write = f"{{{{- {expression(self.system)} }}}}"
            yield write if self.always_system else f"{{%- if system %}}{write}{{%- endif %}}"

    def _turns(self) -> Iterator[str]:
        """The loop over questions and answers."""
        yield "{%- for message in turns %}"
        if self.alternates:
            says = "message.role in ('user', 'assistant')"  # other roles have a sentence of their own, below
            yield f"    {{%- if {says} and (message.role == 'user') != (loop.index0 % 2 == 0) %}}"
            yield "        {{- raise_exception('user and assistant turns must alternate, a user turn first') }}"
            yield "    {%- endif %}"
        yield f"    {{%- set content = (message.content or ''){' | trim' if self.trim else ''} %}}"
        if self.fuse_system:
            yield "    {%- if loop.first and system %}"
            yield f"        {{%- set content = {expression(self.system + '{content}')} %}}"
            yield "    {%- endif %}"
        yield "    {%- if message.role == 'user' %}"
        if self.between:
            yield f"        {{%- if not loop.first %}}{{{{- {expression(self.between)} }}}}{{%- endif %}}"
        yield f"        {{{{- {expression(self.user)} }}}}"
        yield "    {%- elif message.role == 'assistant' %}"
        if self.header:
            yield f"        {{{{- {expression(self.header)} }}}}"
        yield f"        {{%- generation %}}{{{{- {expression(self.answer)} }}}}{{%- endgeneration %}}"
        if self.after:
            yield f"        {{{{- {expression(self.after)} }}}}"
        yield "    {%- else %}"
        yield "        {{- raise_exception('this template has no place for a turn of role ' + message.role) }}"
        yield "    {%- endif %}"
        yield "{%- endfor %}"

    def _prompt(self) -> Iterator[str]:
        """The header of the answer to come."""
        if self.header:
            yield f"{{%- if add_generation_prompt %}}{{{{- {expression(self.header)} }}}}{{%- endif %}}"


def expression(text: str) -> str:
    """The text as a Jinja expression, its fields filled in.

    >>> expression("Human: {content}")
    "'Human: ' + content"
    """
    parts = FIELD.split(text)  # text, field, text, field, ..., text
    values = [VALUES[part] if odd % 2 else quoted(part) for odd, part in enumerate(parts) if part]
    return " + ".join(values)


def quoted(text: str) -> str:
    """The text as a Jinja string."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
