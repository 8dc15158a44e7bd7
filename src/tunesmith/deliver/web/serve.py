"""A model over HTTP: OpenAI-style endpoints and a chat page, for this machine unless a host and a token say more."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tunesmith.config import DecodingConfig
from tunesmith.deliver.answer import Writer
from tunesmith.deliver.web.access import access_token, address, listen, require_server, run_app

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def serve(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    decoding: DecodingConfig | Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    system: str | None = None,
    token: str | None = None,
    console: Console | None = None,
) -> None:
    """Answer requests until Ctrl-C: `/v1/chat/completions`, `/v1/completions`, `/v1/models`, and a chat page at `/`.

    Requests wait in line for the model; answers are greedy unless a request, or `decoding`, asks for sampling.

    Args:
        model: answers on its own device.
        tokenizer: read, not changed.
        name: what clients call the model.
        host: 127.0.0.1 is for this machine only; 0.0.0.0 lets others in, with the token.
        port: 0 takes a free one.
        decoding: see `DecodingConfig`; what holds where a request says nothing.
        chat_template: Jinja text used in place of the tokenizer's own.
        chat_template_kwargs: variables of the template; a request's own win.
        system: system message of conversations that bring none.
        token: what every request must carry. None: TUNESMITH_TOKEN; else none on a loopback host, and on another one
            a new one, printed once.
        console: where the addresses are printed.

    Raises: ConfigError where the extra `serve` is not installed, the port is taken, or the token is unusable.
    """
    require_server("serve")
    from tunesmith.deliver.web.api import create_api

    token = access_token(host, token)
    writer = Writer(model, tokenizer, decoding, chat_template, chat_template_kwargs)
    listener = listen(host, port)
    show_addresses(console or Console(), name, host, listener.getsockname()[1], token)
    run_app(create_api(writer, name=name, system=system, token=token), listener)


def show_addresses(console: Console, name: str, host: str, port: int, token: str | None) -> None:
    """Where to look, where to send, and how to end it."""
    for label, text in (
        ("serving", name),
        ("chat page", address(host, port, token)),
        ("OpenAI API", address(host, port) + "v1" + (" (api_key: the token in the line above)" if token else "")),
        ("end", "Ctrl-C"),
    ):
        console.out(f"{label:12}{text}", highlight=False)
