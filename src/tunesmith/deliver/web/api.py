"""HTTP → answers of one model, in the shapes of OpenAI's API, and the chat page that asks for them."""

import asyncio
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from threading import Event
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tunesmith.deliver.answer import Asked, Line, Writer, Written
from tunesmith.deliver.web.access import ASGIApp, Refused
from tunesmith.deliver.web.app import failure, guarded, json_body, page_routes
from tunesmith.deliver.web.request import Question, read_question
from tunesmith.evaluate.generate import context_length

MAX_WAITING = 32
SECONDS_BETWEEN_LOOKS = 0.2  # how soon a client that left is noticed
CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


class Api:
    """The endpoints over one model.

    Args:
        writer: the model, ready to answer.
        name: what clients call it.
        system: system message of conversations that bring none.
    """

    def __init__(self, writer: Writer, name: str, system: str | None = None) -> None:
        self.writer, self.name, self.system = writer, name, system
        self.line = Line(writer, MAX_WAITING)
        self.started = int(time.time())

    def routes(self) -> list[Route]:
        """Every address there is; no file is served by its path."""
        return [
            Route("/health", self.health),
            Route("/settings", self.settings),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.complete, methods=["POST"]),
            *page_routes({"/": "chat.html", "/chat.js": "chat.js", "/tunesmith.css": "tunesmith.css"}),
        ]

    async def health(self, request: Request) -> Response:
        """Alive; says nothing else, for it is open to all."""
        return JSONResponse({"status": "ok"})

    async def settings(self, request: Request) -> Response:
        """What the chat page begins with."""
        decoding = self.writer.decoding
        temperature = decoding["temperature"] if decoding["do_sample"] else 0
        return JSONResponse({"model": self.name, "system": self.system or "", "temperature": temperature})

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """The one model by its name."""
        if request.path_params["name"] != self.name:
            raise Refused(404, f"This server serves '{self.name}'.", code="model_not_found")
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.started, "owned_by": "tunesmith"}

    async def chat(self, request: Request) -> Response:
        """`/v1/chat/completions`."""
        return await self._reply(request, is_chat=True)

    async def complete(self, request: Request) -> Response:
        """`/v1/completions`: a text goes on; no chat template."""
        return await self._reply(request, is_chat=False)

    async def _reply(self, request: Request, is_chat: bool) -> Response:
        question = read_question(await json_body(request), self.name, is_chat=is_chat)
        if self.line.is_full:
            raise Refused(429, f"{MAX_WAITING} requests are waiting already. Ask again later.")
        asked = await run_in_threadpool(self._prepare, question)
        shape = Shape(self.name, is_chat, len(asked.input_ids))
        if question.is_streamed:
            stream = self._stream(request, question, asked, shape)
            return StreamingResponse(stream, media_type="text/event-stream")
        pieces, end = [], Written(0, "stop")
        async for piece in self._pieces(request, asked):
            if isinstance(piece, Written):
                end = piece
            else:
                pieces.append(piece)
        return JSONResponse(shape.whole("".join(pieces), end, has_tools=bool(question.tools)))

    def _prepare(self, question: Question) -> Asked:
        """The prompt's tokens, and an answer's length that the model's context has room for."""
        if question.prompt is not None:
            ids = self.writer.encode_text(question.prompt)
        else:
            messages = question.messages
            if self.system and messages[0]["role"] not in ("system", "developer"):
                messages = [{"role": "system", "content": self.system}, *messages]
            ids = self.writer.encode(messages, question.tools, question.template_kwargs)
        if not ids:
            raise Refused(400, "The prompt has no tokens, so there is nothing to answer. Give it some text.")
        decoding = self.writer.decoding | question.decoding
        if (room := self.writer.room(ids, decoding)) < 1:
            raise Refused(
                400,
                f"The prompt has {len(ids):,} tokens; with its answer the model reads "
                f"{context_length(self.writer.model):,} at most.",
                param="messages" if question.prompt is None else "prompt",
                code="context_length_exceeded",
            )
        decoding["max_new_tokens"] = room
        return Asked(ids, decoding, question.stop, question.seed)

    async def _pieces(self, request: Request, asked: Asked) -> AsyncIterator[str | Written]:
        """The answer as it is written; it ends early when the client leaves, while it waits in line, too."""
        stop = Event()
        watch = asyncio.create_task(stop_when_gone(request, stop))
        try:
            async for piece in self.line.answer(asked, stop):
                yield piece
        finally:
            stop.set()
            watch.cancel()

    async def _stream(self, request: Request, question: Question, asked: Asked, shape: "Shape") -> AsyncIterator[str]:
        """Server-sent events. With tools the answer comes in one piece: only whole calls can be read."""
        held: list[str] = []
        if shape.is_chat:
            yield event(shape.chunk({"role": "assistant", "content": ""}))
        try:
            async for piece in self._pieces(request, asked):
                if isinstance(piece, str) and question.tools:
                    held.append(piece)
                elif isinstance(piece, str):
                    yield event(shape.chunk({"content": piece}))
                else:
                    message, reason = shape.message("".join(held), piece, has_tools=bool(question.tools))
                    if held:
                        calls = [{"index": place, **call} for place, call in enumerate(message.get("tool_calls", []))]
                        yield event(shape.chunk({**message, **({"tool_calls": calls} if calls else {})}))
                    yield event(shape.chunk({}, reason))
                    if question.counts_usage:
                        yield event(shape.chunk(None) | {"usage": shape.usage(piece)})
        except Exception as error:
            yield event(failure(error).to_json())
        yield "data: [DONE]\n\n"


class Shape:
    """Answers as OpenAI's clients read them."""

    def __init__(self, name: str, is_chat: bool, prompt_tokens: int) -> None:
        self.name, self.is_chat, self.prompt_tokens = name, is_chat, prompt_tokens
        self.id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, text: str, end: Written, has_tools: bool) -> dict[str, Any]:
        """A whole answer."""
        message, reason = self.message(text, end, has_tools)
        said = {"message": message} if self.is_chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._head(kind) | {"choices": [choice], "usage": self.usage(end)}

    def chunk(self, delta: Mapping[str, Any] | None, reason: str | None = None) -> dict[str, Any]:
        """One piece of a stream; `None`: the one without a choice that carries the counts."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        if delta is None:
            return self._head(kind) | {"choices": []}
        said = {"delta": delta} if self.is_chat else {"text": delta.get("content", "")}
        return self._head(kind) | {"choices": [{"index": 0, **said, "logprobs": None, "finish_reason": reason}]}

    def message(self, text: str, end: Written, has_tools: bool) -> tuple[dict[str, Any], str]:
        """The assistant's message and why it ended; where tools were given, without its `<tool_call>` tags."""
        calls = [call for found in CALL.findall(text) if (call := tool_call(found))] if has_tools else []
        if not calls:
            return {"role": "assistant", "content": text}, end.finish_reason
        rest = CALL.sub("", text).strip()
        return {"role": "assistant", "content": rest or None, "tool_calls": calls}, "tool_calls"

    def usage(self, end: Written) -> dict[str, int]:
        """Token counts."""
        total = self.prompt_tokens + end.num_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": end.num_tokens,
            "total_tokens": total,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}


def tool_call(text: str) -> dict[str, Any] | None:
    """A call as OpenAI writes it, from the JSON inside a model's tags; None where it is no call."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    function = {"name": value["name"], "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


async def stop_when_gone(request: Request, stop: Event) -> None:
    """Set `stop` when the client has left."""
    while not await request.is_disconnected():
        await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
    stop.set()


def event(value: Any) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=True)}\n\n"


# ---------------------------------------------------------------------------------------------------- the application


def create_api(writer: Writer, *, name: str, system: str | None = None, token: str | None = None) -> ASGIApp:
    """The guarded application; see `Api`."""
    api = Api(writer, name, system)
    return guarded(api.routes(), token, close=api.line.close)
