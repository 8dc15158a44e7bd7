"""A conversation in the terminal: lines in, streamed answers out; Ctrl-C stops an answer, a second one leaves.

It also works in a pipe (`echo 'Hello' | tunesmith chat runs/mine`): one line is one user turn, and nothing but the
answers is written.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from queue import Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers import StoppingCriteria, TextIteratorStreamer

from tunesmith.config import DecodingConfig
from tunesmith.errors import TunesmithError
from tunesmith.evaluate.generate import (
    answering,
    encode_prompt,
    generation_config,
    padding_id,
    stop_token_ids,
)
from tunesmith.evaluate.predict import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELP = "/reset begins anew · /system TEXT sets the system message · Ctrl-C stops an answer · /exit leaves"


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
    """
    console = console or Console()
    read_line = read_line or _reader(console)
    talk = _Talk(model, tokenizer, decoding, chat_template, chat_template_kwargs)
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
        if line == "/reset":
            messages = [message for message in messages if message["role"] == "system"]
            _note(console, "The conversation is forgotten.")
        elif line.split(maxsplit=1)[:1] == ["/system"]:
            messages = _opening(line[len("/system") :].strip() or None)
            _note(console, "A new conversation begins with this system message." if messages else "No system message.")
        elif line.startswith("/") and line.split()[0] in ("/help", "/?"):
            _note(console, HELP)
        elif line:
            messages = _turn(talk, messages, line, console)
    if console.is_terminal:
        console.print()
    return messages


def _opening(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _turn(talk: "_Talk", messages: list[dict[str, str]], line: str, console: Console) -> list[dict[str, str]]:
    """The conversation with this turn and its answer, or as it was if there was no answer."""
    asked = [*messages, {"role": "user", "content": line}]
    try:
        answer = _write_answer(talk, asked, console)
    except TunesmithError as error:  # e.g. a template without system messages: say it, and go on talking
        console.print(str(error), style="red", highlight=False, markup=False)
        return messages
    if not answer:  # stopped before its first word, or the model had nothing to say
        _note(console, "(no answer; the question is forgotten)")
        return messages
    return [*asked, {"role": "assistant", "content": answer}]


def _write_answer(talk: "_Talk", messages: list[dict[str, str]], console: Console) -> str:
    """Stream the answer to the console. Ctrl-C ends it; what was written until then is the answer."""
    pieces: list[str] = []
    stream = talk.answer(messages)
    try:
        for piece in stream:
            pieces.append(piece)
            console.out(printable(piece), end="", highlight=False)
            console.file.flush()
    except KeyboardInterrupt:
        console.out(" …", end="", highlight=False)
    finally:
        stream.close()  # waits for the model to lay down its pen
    console.out("", highlight=False)
    return "".join(pieces).strip()


class _Talk:
    """A model that answers conversations piece by piece."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        decoding: DecodingConfig | Mapping[str, Any] | None,
        chat_template: str | None,
        chat_template_kwargs: Mapping[str, Any] | None,
    ) -> None:
        self.model, self.tokenizer, self.chat_template = model, tokenizer, chat_template
        self.chat_template_kwargs = chat_template_kwargs
        stop_ids = stop_token_ids(model, tokenizer, chat_template)
        self.config = generation_config(decoding, stop_ids, padding_id(tokenizer, stop_ids))

    def answer(self, messages: list[dict[str, str]]) -> Iterator[str]:
        """Pieces of text as they come. Closing the iterator stops the model after the token it is at."""
        prompt = encode_prompt(
            self.tokenizer,
            messages,
            chat_template=self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        ids = torch.tensor([prompt.input_ids])  # (1, S)
        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        stop, failures = _Stop(), Queue()
        arguments = (ids.to(self.model.get_input_embeddings().weight.device), streamer, stop, failures)
        worker = Thread(target=self._generate, args=arguments, daemon=True)
        worker.start()
        try:
            yield from streamer
        finally:
            stop.asked.set()
            worker.join()
        if not failures.empty():
            raise failures.get()

    def _generate(self, ids: torch.Tensor, streamer: TextIteratorStreamer, stop: "_Stop", failures: Queue) -> None:
        try:
            with answering(self.model):
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self.config,
                    streamer=streamer,
                    stopping_criteria=[stop],
                )
        except BaseException as error:  # raised again where the answer is read; else that would wait for ever
            failures.put(error)
            streamer.on_finalized_text("", stream_end=True)


class _Stop(StoppingCriteria):
    """Ends generation after the current token once `asked` is set."""

    def __init__(self) -> None:
        self.asked = Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.asked.is_set(), device=input_ids.device)


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
