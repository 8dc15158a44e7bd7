"""HTTP → run directories as JSON, training started and stopped, and the pages that show it."""

import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tunesmith.data.report import visible
from tunesmith.deliver.web import launch, run_folder
from tunesmith.deliver.web.access import ASGIApp, Refused
from tunesmith.deliver.web.app import guarded, json_body, page_routes
from tunesmith.errors import ConfigError

RECIPE_SUFFIXES = (".yaml", ".yml", ".json")
CODE = re.compile(r".*\.py:\s*\w+|[\w.]+:[A-Za-z_]\w*", re.DOTALL)  # what `lookup` imports, one of a list


class Board:
    """The endpoints over one folder of runs.

    Args:
        folder: where the runs lie.
        load: reads a recipe file; raises ConfigError with all its problems.
    """

    def __init__(self, folder: Path, load: Callable[[Path], Any]) -> None:
        self.folder, self.load = folder, load
        self.starting = Lock()  # of two clicks at once the second must see the first run

    def routes(self) -> list[Route]:
        """Every address there is; runs are named by ids that `find_runs` gave."""
        return [
            Route("/health", self.health),
            Route("/api/runs", self.runs, methods=["GET"]),
            Route("/api/runs", self.start, methods=["POST"]),
            Route("/api/check", self.check, methods=["POST"]),
            Route("/api/runs/{id}", self.run),
            Route("/api/runs/{id}/curve", self.curve),
            Route("/api/runs/{id}/stop", self.stop, methods=["POST"]),
            *page_routes({"/": "studio.html", "/studio.js": "studio.js", "/tunesmith.css": "tunesmith.css"}),
        ]

    async def health(self, request: Request) -> Response:
        """Alive; says nothing else, for it is open to all."""
        return JSONResponse({"status": "ok"})

    async def runs(self, request: Request) -> Response:
        """All runs, in a line each."""

        def look() -> list[dict[str, Any]]:
            return [run_folder.summary(run_id, path) for run_id, path in run_folder.find_runs(self.folder).items()]

        return JSONResponse({"folder": str(self.folder), "runs": await run_in_threadpool(look)})

    async def run(self, request: Request) -> Response:
        """One run."""
        run_id, path = self._named(request)
        return JSONResponse(await run_in_threadpool(run_folder.details, run_id, path))

    async def curve(self, request: Request) -> Response:
        """Its losses."""
        return JSONResponse(await run_in_threadpool(run_folder.curve, self._named(request)[1]))

    async def stop(self, request: Request) -> Response:
        """Send it what Ctrl-C sends."""
        await json_body(request)  # a page of another site cannot send one
        return JSONResponse({"pid": launch.stop_training(self._named(request)[1])})

    def _named(self, request: Request) -> tuple[str, Path]:
        run_id = request.path_params["id"]
        path = run_folder.find_runs(self.folder).get(run_id)
        if path is None:
            raise Refused(404, f"There is no run '{visible(run_id, 80)}'.")
        return run_id, path

    async def check(self, request: Request) -> Response:
        """Read a recipe and say where its run would go, or all that is wrong with it."""
        body = await json_body(request)
        output_dir, _ = await run_in_threadpool(self._checked, body)
        return JSONResponse({"output_dir": str(output_dir)})

    async def start(self, request: Request) -> Response:
        """Check a recipe and train it in a process of its own."""
        body = await json_body(request)

        def work() -> launch.Start:
            output_dir, recipe = self._checked(body)
            try:
                recipe = recipe or launch.save_recipe(body["recipe"], output_dir)
                was_pasted = recipe.resolve().is_relative_to(self.folder.resolve())  # now, or some time before
                with self.starting:
                    return launch.start_training(recipe, output_dir, may_import=not was_pasted)
            except OSError as error:  # of the files beside the run directory, whose names are longer than its own
                raise ConfigError(f"{visible(str(output_dir), 80)}: {error.strerror}. Name another folder.") from None

        start = await run_in_threadpool(work)
        run_id = start.output_dir.resolve().relative_to(self.folder.resolve()).as_posix().replace("/", "~")
        return JSONResponse({"id": run_id, "pid": start.pid}, 201)

    def _checked(self, body: dict[str, Any]) -> tuple[Path, Path | None]:
        """Where the run would go, and the recipe file if it is one that lies on this machine."""
        text, path = body.get("recipe"), body.get("path")
        if isinstance(path, str) and path.strip():
            recipe = recipe_file(path.strip())
            return self._place(self.load(recipe)), recipe
        if not isinstance(text, str) or not text.strip():
            raise Refused(400, "Give the path of a recipe, or paste one.", param="recipe")
        with tempfile.TemporaryDirectory() as folder:
            recipe = Path(folder) / "recipe.yaml"
            recipe.write_text(text, encoding="utf-8")
            try:
                loaded = self.load(recipe)
            except ConfigError as error:
                raise ConfigError(str(error).replace(f"{folder}/", "")) from None
        refuse_code(loaded)
        return self._place(loaded), None

    def _place(self, recipe: Any) -> Path:
        """The recipe's output_dir, which must be one that the studio shows."""
        given = recipe.training.get("output_dir")
        try:
            output_dir = Path(given or "").expanduser()
            inside, root = output_dir.resolve(), self.folder.resolve()
        except (OSError, ValueError) as error:  # such as a character of number 0
            raise ConfigError(f"output_dir {visible(str(given), 80)}: {error}. Name a folder.") from None
        if inside == root or not inside.is_relative_to(root) or len(inside.relative_to(root).parts) > 2:
            what = f"is {visible(str(given), 80)}" if given else "is missing"
            raise ConfigError(f"output_dir {what}. Name a folder that this page shows, like {self.folder / 'mine'}.")
        return output_dir


def recipe_file(path: str) -> Path:
    """A recipe that lies under the folder the studio was started in; other files are nobody's business.

    Raises: ConfigError otherwise.
    """
    here = Path.cwd().resolve()
    try:
        recipe = Path(path).resolve()
        is_recipe = recipe.is_relative_to(here) and recipe.suffix in RECIPE_SUFFIXES and recipe.is_file()
    except (OSError, ValueError):
        is_recipe = False
    if not is_recipe:
        raise ConfigError(
            f"{visible(path, 120)}: there is no such recipe. Give the path of a .yaml or .json file under the folder "
            "in which the studio was started."
        )
    return recipe


def refuse_code(recipe: Any) -> None:
    """What comes over the network must not name Python files to run (`format: file.py:function`, `module:function`).

    The process that trains one imports nothing either (`lookup.NO_CODE`); this says it before there is one.

    Raises: ConfigError that says so.
    """
    for value in _texts(dataclasses.asdict(recipe) | {"given": None}):
        if named := next((part for part in value.split(",") if CODE.fullmatch(part.strip())), None):
            raise ConfigError(
                f"'{visible(named.strip(), 80)}' names code, which a pasted recipe may not. Save the recipe as a file "
                "and give its path."
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def create_board(folder: Path, load: Callable[[Path], Any], token: str | None = None) -> ASGIApp:
    """The guarded application; see `Board`."""
    return guarded(Board(folder, load).routes(), token)
