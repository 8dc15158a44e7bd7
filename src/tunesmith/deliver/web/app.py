"""What both servers are made of: a guarded application, pages at fixed addresses, JSON bodies, errors as JSON."""

import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from tunesmith.data.report import visible
from tunesmith.deliver.web.access import ASGIApp, Guard, Refused
from tunesmith.errors import TunesmithError

logger = logging.getLogger(__name__)

BODY_LIMIT = 1 << 20  # bytes; a long conversation has some ten thousand
PAGES = Path(__file__).parent / "pages"


def guarded(routes: Sequence[Route], token: str | None, close: Callable[[], None] | None = None) -> ASGIApp:
    """An application behind the guard, whose errors are JSON sentences."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        if close:
            close()

    async def say(request: Request, error: Exception) -> Response:
        refusal = failure(error)
        return JSONResponse(refusal.to_json(), refusal.status)

    handlers = {Refused: say, HTTPException: say, TunesmithError: say, Exception: say}
    return Guard(Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers), token)


def failure(error: Exception) -> Refused:
    """What a client is told; of an error of our own only that there was one."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, HTTPException):
        return Refused(
            error.status_code, {404: "There is nothing at this address."}.get(error.status_code, error.detail)
        )
    if isinstance(error, TunesmithError):
        return Refused(400, str(error))
    logger.error("a request failed", exc_info=error)
    return Refused(500, f"The server failed: {type(error).__name__}. Its log says more.")


async def json_body(request: Request) -> dict[str, Any]:
    """The JSON object that a request holds.

    Only `application/json` is read: a form of a foreign page cannot send it.

    Raises: Refused: 413 over `BODY_LIMIT`, 415 for another type, 400 for anything but an object.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "Send the body as 'Content-Type: application/json'.")
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > BODY_LIMIT:
                raise Refused(413, f"The body is over the limit of {BODY_LIMIT:,} bytes.")
            parts.append(part)
    except ClientDisconnect:
        raise Refused(400, "The client left before its body was whole.") from None
    try:
        value = json.loads(b"".join(parts))
        json.dumps(value, ensure_ascii=False).encode()  # halves of characters, which no tokenizer takes
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"The body is not valid JSON: {visible(str(error), 120)}.") from None
    if not isinstance(value, dict):
        raise Refused(400, f"The body is a JSON {type(value).__name__}; expected an object.")
    return value


def page_routes(files: Mapping[str, str]) -> list[Route]:
    """A fixed address for each packaged file."""

    def route(path: str, name: str) -> Route:
        async def page(request: Request) -> Response:
            return FileResponse(PAGES / name)

        return Route(path, page)

    return [route(path, name) for path, name in files.items()]
