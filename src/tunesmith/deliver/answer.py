"""Token ids → an answer, told as it is written, in the terminal or over HTTP; there first come, first served.

A model on one device answers one prompt about as fast as its weights can be read, so requests wait in line; that way
the text of two of them cannot mix, and a seed gives the same answer whatever else is asked.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from tunesmith.config import DecodingConfig
from tunesmith.data.render import Rendered
from tunesmith.evaluate.generate import (
    answering,
    context_length,
    decoding_options,
    encode_prompt,
    encode_rendered,
    generation_config,
    padding_id,
    stop_token_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Asked(NamedTuple):
    """One prompt, ready to be answered."""

    input_ids: list[int]
    decoding: dict[str, Any]
    """All options of `DecodingConfig`."""
    stop: Sequence[str] = ()
    """Texts that end the answer and are not part of it."""
    seed: int | None = None


class Written(NamedTuple):
    """How an answer ended."""

    num_tokens: int
    """New tokens, the stop token included."""
    finish_reason: Literal["stop", "length"]


class Writer:
    """A model that answers prompts; `encode` may be called from any thread, `write` from one at a time.

    Args:
        model: answers on its own device.
        tokenizer: read, not changed.
        decoding: what holds where a request says nothing. Beam search is left out: it cannot tell while it writes.
        chat_template: Jinja text used in place of the tokenizer's own.
        chat_template_kwargs: variables of the template; a request's own win.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        decoding: DecodingConfig | Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer, self.chat_template = model, tokenizer, chat_template
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.decoding = decoding_options(decoding) | {"num_beams": 1}
        self.stop_ids = stop_token_ids(model, tokenizer, chat_template)
        self.pad_id = padding_id(tokenizer, self.stop_ids)
        self.tokenizer_lock = Lock()  # fast tokenizers refuse to encode and decode at once ("Already borrowed")

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The conversation as training shows it before its next answer. Raises: as `encode_prompt`."""
        kwargs = {**self.chat_template_kwargs, **(chat_template_kwargs or {})}
        how = {"chat_template": self.chat_template, "chat_template_kwargs": kwargs or None}
        with self.tokenizer_lock:
            return encode_prompt(self.tokenizer, messages, tools, **how).input_ids

    def encode_text(self, text: str) -> list[int]:
        """A text to be continued, as plain-text training begins one."""
        with self.tokenizer_lock:
            return encode_rendered(self.tokenizer, Rendered(text, [], add_bos=True)).input_ids

    def room(self, input_ids: Sequence[int], decoding: Mapping[str, Any] | None = None) -> int:
        """New tokens that `max_new_tokens` and the model's positions allow after a prompt; below 1, no answer."""
        most, limit = (decoding or self.decoding)["max_new_tokens"], context_length(self.model)
        return most if limit is None else min(most, limit - len(input_ids))

    def write(self, asked: Asked, say: Callable[[str], None], stopped: Callable[[], bool] = lambda: False) -> Written:
        """Answer; `say` gets each piece of text as it is written, `stopped` is asked after each token."""
        if stopped():
            return Written(0, "stop")
        pen = _Pen(self, asked.stop, say)
        device = self.model.get_input_embeddings().weight.device
        ids = torch.tensor([asked.input_ids], device=device)  # (1, S)
        with answering(self.model), seeded(asked.seed, device):
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=generation_config(asked.decoding, self.stop_ids, self.pad_id),
                streamer=pen,
                stopping_criteria=[_Until(lambda: pen.is_done or stopped())],
            )
        pen.finish()
        return Written(pen.num_tokens, "stop" if pen.is_done or stopped() else "length")


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draws inside begin at `seed`; afterwards the generators are where they were."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _Pen(BaseStreamer):
    """Tokens in, text out: whole characters only, and nothing from a stop text on."""

    def __init__(self, writer: Writer, stop: Sequence[str], say: Callable[[str], None]) -> None:
        self.writer, self.stop, self.say = writer, [text for text in stop if text], say
        self.ids: list[int] = []
        self.num_tokens = self.begin = self.told = 0
        self.held = ""
        self.is_done = False
        self.prompt_is_past = False

    def put(self, value: torch.Tensor) -> None:
        """Transformers gives the prompt first, then token after token."""
        if not self.prompt_is_past:
            self.prompt_is_past = True
            return
        if self.is_done:  # the generation loop may be a token ahead
            return
        token = int(value)
        self.num_tokens += 1
        if token in self.writer.stop_ids:
            self.is_done = True
            return
        self.ids.append(token)
        self._tell(self._new_text())

    def end(self) -> None:
        """What is still held is told by `finish`, once the generation has returned."""

    def finish(self) -> None:
        """Tell what was held back in case more came."""
        self._tell(self._new_text(is_last=True))
        if self.held:
            self.say(self.held)
            self.held = ""

    def _new_text(self, is_last: bool = False) -> str:
        """The text that the tokens since the last call add.

        It is the difference of two decoded stretches that begin together, a little back: some tokenizers drop the
        space before the first token of a stretch, and a character may be spread over several tokens.
        """
        before = self._decode(self.ids[self.begin : self.told])
        text = self._decode(self.ids[self.begin :])
        if len(text) <= len(before) or (text.endswith("\ufffd") and not is_last):
            return ""
        self.begin, self.told = self.told, len(self.ids)
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        with self.writer.tokenizer_lock:
            return self.writer.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _tell(self, text: str) -> None:
        """Say `text` but for an end that may be the beginning of a stop text."""
        self.held += text
        places = [place for stop in self.stop if (place := self.held.find(stop)) >= 0]
        if places:
            ready, self.held, self.is_done = self.held[: min(places)], "", True
        else:
            keep = max((_overlap(self.held, stop) for stop in self.stop), default=0)
            ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        if ready:
            self.say(ready)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`.

    >>> _overlap("all for on", "one")
    2
    """
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


class _Until(StoppingCriteria):
    """Ends generation after the current token once `is_over` says so."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self.is_over = is_over

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.is_over(), device=input_ids.device)


# ---------------------------------------------------------------------------------------------------- the line


class Line:
    """Requests that wait for the one writer."""

    def __init__(self, writer: Writer, limit: int) -> None:
        self.writer, self.limit = writer, limit
        self.num_inside = 0
        self.closing = Event()
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="answers")

    @property
    def is_full(self) -> bool:
        """Whether a further request should be sent away."""
        return self.num_inside >= self.limit

    async def answer(self, asked: Asked, stop: Event) -> AsyncIterator[str | Written]:
        """Pieces of text, then how it ended. `stop`, or closing the iterator, ends it after the current token."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()

        def say(piece: str | Written | BaseException) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def work() -> None:
            try:
                say(self.writer.write(asked, say, lambda: stop.is_set() or self.closing.is_set()))
            except BaseException as error:  # raised again where the answer is read; else that would wait for ever
                say(error)

        self.num_inside += 1
        self.thread.submit(work)
        try:
            while isinstance(piece := await pieces.get(), str):
                yield piece
            if isinstance(piece, BaseException):
                raise piece
            yield piece
        finally:
            stop.set()
            self.num_inside -= 1

    def close(self) -> None:
        """End what is being written and send away who waits."""
        self.closing.set()
        self.thread.shutdown(wait=False, cancel_futures=True)
