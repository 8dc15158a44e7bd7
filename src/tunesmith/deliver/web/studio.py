"""A folder of runs as web pages: where each stands, its curve, its answers; and training started from there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from tunesmith.deliver.web.access import access_token, address, listen, require_server, run_app
from tunesmith.errors import ConfigError


def studio(
    folder: str | Path = "runs",
    *,
    load: Callable[[Path], Any],
    host: str = "127.0.0.1",
    port: int = 7860,
    token: str | None = None,
    console: Console | None = None,
) -> None:
    """Show the runs of a folder until Ctrl-C. It keeps nothing itself: runs go on without it, and it finds them again.

    Args:
        folder: where run directories lie, or one run directory; made when the first run starts.
        load: reads and checks a recipe file: `recipe.load_recipe`.
        host: 127.0.0.1 is for this machine only; 0.0.0.0 lets others in, with the token.
        port: 0 takes a free one.
        token: what every request must carry. None: TUNESMITH_TOKEN; else none on a loopback host, and on another one
            a new one, printed once.
        console: where the address is printed.

    Raises: ConfigError where the extra `studio` is not installed, the folder is a file, or the port is taken.
    """
    require_server("studio")
    from tunesmith.deliver.web.board import create_board

    folder, console = Path(folder).expanduser(), console or Console()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file. Name the folder that holds the runs.")
    token = access_token(host, token)
    listener = listen(host, port)
    console.out(f"{'runs in':12}{folder}", highlight=False)
    console.out(f"{'studio':12}{address(host, listener.getsockname()[1], token)}", highlight=False)
    console.out(f"{'end':12}Ctrl-C; what is training goes on", highlight=False)
    run_app(create_board(folder, load, token), listener)
