"""What the two servers share: where they listen, who may ask, and how a refusal is worded.

A web page of anybody can send requests to a server on this machine. So a request must name a loopback host (a page
that points its own domain at 127.0.0.1 cannot) or carry the token, and one that says which page it comes from must
come from ours. Nothing here imports starlette or uvicorn before a server starts.
"""

import importlib.util
import ipaddress
import json
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from tunesmith.data.report import visible
from tunesmith.errors import ConfigError

TOKEN_VARIABLE = "TUNESMITH_TOKEN"
OPEN_PATHS = ("/health",)

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Callable, Send], Awaitable[None]]


class Refused(Exception):
    """A request that is answered with an error status and one sentence, in OpenAI's shape."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_json(self) -> dict[str, Any]:
        """What the client reads."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


# ---------------------------------------------------------------------------------------------------- before the start


def require_server(extra: str) -> None:
    """Raise ConfigError, naming the extra, where the server libraries are missing."""
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} cannot be imported. Run: pip install 'tunesmith[{extra}]'.")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def access_token(host: str, token: str | None = None) -> str | None:
    """The token that every request must carry: the given one, TUNESMITH_TOKEN, or a new one where others can reach us.

    Returns: None on a loopback host, unless one was given.
    """
    token = token or os.environ.get(TOKEN_VARIABLE) or None
    if token is not None and (not token.isascii() or not token.isprintable() or set(token) & set(' ";,\\')):
        raise ConfigError(f'{TOKEN_VARIABLE}: a token is made of letters, digits and signs other than space " ; , \\.')
    return token or (None if is_loopback(host) else secrets.token_urlsafe(32))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises: ConfigError where the port is taken or the host is not this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if getattr(error, "errno", None) else error
        raise ConfigError(
            f"cannot listen on {host} port {port}: {reason}. Choose another --port or --host."
        ) from error


def address(host: str, port: int, token: str | None = None) -> str:
    """What a person opens in a browser."""
    name = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    name = f"[{name}]" if ":" in name else name
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")


def run_app(app: ASGIApp, listener: socket.socket) -> None:
    """Serve until Ctrl-C. Requests are not logged: an address may hold the token."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=2,
    )
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:  # uvicorn has shut down and passes the signal on; for a server it is the normal end
        pass
    finally:
        listener.close()


# ---------------------------------------------------------------------------------------------------- each request


class Guard:
    """ASGI middleware: lets a request through or refuses it, and puts the security headers on every answer.

    Args:
        app: the application behind it.
        token: what every request must carry (header `Authorization: Bearer`, the cookie, or once `?token=`, which sets
            the cookie). None: none, and then the request's Host must be a loopback name.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Callable, send: Send) -> None:
        """Refuse or pass on one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            check_host(headers.get("host", ""), has_token=self.token is not None)
            check_origin(headers.get("origin"), headers.get("host", ""))
            if self.token is not None and scope["path"] not in OPEN_PATHS:
                if self._has(parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]):
                    await self._remember(scope, send)
                    return
                self._check_token(headers, scope)
        except Refused as refusal:
            await send_json(send, refusal.status, refusal.to_json(), {"www-authenticate": "Bearer"})
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *encoded(HEADERS)]
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _check_token(self, headers: Mapping[str, str], scope: Scope) -> None:
        kind, _, value = headers.get("authorization", "").partition(" ")
        cookie = cookie_in(headers.get("cookie", ""), cookie_name(scope))
        if not (kind.lower() == "bearer" and self._has(value.strip())) and not self._has(cookie):
            raise Refused(
                401,
                "The token is missing or wrong. Open the printed address, or send 'Authorization: Bearer TOKEN'.",
                code="invalid_api_key",
            )

    def _has(self, candidate: str) -> bool:
        return bool(self.token) and secrets.compare_digest(candidate.encode(), self.token.encode())

    async def _remember(self, scope: Scope, send: Send) -> None:
        """Put the token into a cookie that no script reads and no other site sends, and out of the address bar."""
        cookie = f"{cookie_name(scope)}={self.token}; HttpOnly; SameSite=Strict; Path=/"
        place = "/" + quote(scope["path"].lstrip("/"))  # of this server, and one line
        headers = {"location": place, "set-cookie": cookie, "content-length": "0", **HEADERS}
        await send({"type": "http.response.start", "status": 303, "headers": encoded(headers)})
        await send({"type": "http.response.body", "body": b""})


def check_host(host: str, has_token: bool) -> None:
    """Without a token only loopback names are answered: a foreign domain that leads here is somebody's trick."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = ""
    if not has_token and not is_loopback(name):
        raise Refused(403, f"This server answers to localhost only, not to '{visible(host, 60)}'.")


def check_origin(origin: str | None, host: str) -> None:
    """A page may ask only the server that it came from; programs that are no browser send no Origin."""
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        raise Refused(403, f"Requests from pages of '{visible(origin, 60)}' are not answered.")


def cookie_in(header: str, name: str) -> str:
    """The value of a cookie, or nothing. Python's own parser fails at names that other servers of this host gave."""
    pairs = (part.strip().partition("=") for part in header.split(";"))
    return next((value for key, _, value in pairs if key == name), "")


def cookie_name(scope: Scope) -> str:
    """Browsers share cookies between the ports of a host; the two servers must not overwrite each other's."""
    return f"tunesmith-{(scope.get('server') or ('', 0))[1]}"


async def send_json(send: Send, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
    """A whole answer."""
    body = json.dumps(value).encode()
    own = {"content-type": "application/json", "content-length": str(len(body)), **HEADERS, **(headers or {})}
    await send({"type": "http.response.start", "status": status, "headers": encoded(own)})
    await send({"type": "http.response.body", "body": body})


def encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Headers as ASGI wants them."""
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
