"""A conversation in the terminal: lines in, streamed answers out; Ctrl-C stops an answer, a second one leaves.

It also works in a pipe (`echo 'Hello' | tunesmith chat runs/mine`): one line is one user turn, and nothing but the
answers is written.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tunesmith.config import DecodingConfig
from tunesmith.deliver.answer import Asked, Writer
from tunesmith.errors import DataError, TunesmithError
from tunesmith.evaluate.generate import context_length
from tunesmith.evaluate.predict import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELP = "/reset begins anew · /system TEXT sets the system message · Ctrl-C stops an answer · /exit leaves"
COMMANDS = ("/reset", "/system", "/help", "/?")


def chat(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    system: str | None = None,
    decoding: DecodingConfig | Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    console: Console | None = None,
    read_line: Callable[[], str] | None = None,
) -> list[dict[str, str]]:
    """Talk until `/exit`, end of file, or Ctrl-C where no answer is being written.

    Args:
        model: answers on its own device.
        tokenizer: read, not changed.
        system: first message of every conversation.
        decoding: see `DecodingConfig`.
        chat_template: Jinja text used in place of the tokenizer's own.
        chat_template_kwargs: variables of the template.
        console: where answers go. None: standard output.
        read_line: next line of the person, EOFError at the end. None: standard input, with a prompt on a terminal.

    Returns: the conversation as it stood at the end.
    Raises: TunesmithError for a line that cannot be asked, if it did not come from a terminal, where it is said.
    """
    console = console or Console()
    read_line = read_line or _reader(console)
    writer = Writer(model, tokenizer, decoding, chat_template, chat_template_kwargs)
    messages = _opening(system)
    if console.is_terminal:
        console.print(HELP, style="dim", highlight=False, markup=False)
    while True:
        try:
            line = read_line().strip()
        except (EOFError, KeyboardInterrupt):
            break
        if line in ("/exit", "/quit"):
            break
        if line.startswith("/") and line.split()[0] in COMMANDS:
            messages = _command(messages, line, console)
        elif line:
            messages = _turn(writer, messages, line, console)
    if console.is_terminal:
        console.print()
    return messages


def _command(messages: list[dict[str, str]], line: str, console: Console) -> list[dict[str, str]]:
    """The conversation after a line that begins with one of `COMMANDS`."""
    command, *text = line.split(maxsplit=1)
    if command == "/reset":
        _note(console, "The conversation is forgotten.")
        return [message for message in messages if message["role"] == "system"]
    if command == "/system":
        messages = _opening("".join(text))
        _note(console, "A new conversation begins with this system message." if messages else "No system message.")
        return messages
    _note(console, HELP)
    return messages


def _opening(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _turn(writer: Writer, messages: list[dict[str, str]], line: str, console: Console) -> list[dict[str, str]]:
    """The conversation with this turn and its answer, or as it was if there was no answer."""
    asked = [*messages, {"role": "user", "content": line}]
    try:
        answer = _write_answer(writer, asked, console)
    except TunesmithError as error:  # e.g. a template without system messages: say it, and go on talking
        if not console.is_terminal:
            raise
        console.print(str(error), style="red", highlight=False, markup=False)
        return messages
    if not answer:  # stopped before its first word, or the model had nothing to say
        _note(console, "(no answer; the question is forgotten)")
        return messages
    return [*asked, {"role": "assistant", "content": answer}]


def _write_answer(writer: Writer, messages: list[dict[str, str]], console: Console) -> str:
    """Write the answer to the console as it comes. Ctrl-C ends it; what was written until then is the answer."""
    asked = _asked(writer, messages)
    pieces: list[str] = []

    def say(piece: str) -> None:
        pieces.append(piece)
        console.out(printable(piece), end="", highlight=False)
        console.file.flush()

    try:
        writer.write(asked, say)
    except KeyboardInterrupt:
        console.out(" …", end="", highlight=False)
    console.out("", highlight=False)
    return "".join(pieces).strip()


def _asked(writer: Writer, messages: list[dict[str, str]]) -> Asked:
    """The conversation as tokens, and an answer's length that the model has positions for.

    Raises: DataError where it has none left, and for bytes that are no text.
    """
    if any("\udc80" <= character <= "\udcff" for character in messages[-1]["content"]):
        raise DataError("the line holds bytes that are no UTF-8 text. Send it as UTF-8.")
    ids = writer.encode(messages)
    if (room := writer.room(ids)) < 1:
        raise DataError(
            f"the conversation has {len(ids):,} tokens; with its answer the model reads "
            f"{context_length(writer.model):,} at most. /reset begins anew."
        )
    return Asked(ids, {**writer.decoding, "max_new_tokens": room})


def _reader(console: Console) -> Callable[[], str]:
    """Lines of standard input; on a terminal with a prompt, history and editing."""
    if sys.stdin.isatty() and console.is_terminal:
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 -- importing it gives input() history and editing
        return lambda: input("› ")

    def read() -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line

    return read


def _note(console: Console, text: str) -> None:
    """Said to a person only; a pipe gets answers and nothing else."""
    if console.is_terminal:
        console.print(text, style="dim", highlight=False, markup=False)
