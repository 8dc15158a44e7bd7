"""The `tunesmith` command, thin: parse, call one function, print, exit code.

Nothing here imports torch: each command imports what it runs.
"""

import contextlib
import gc
import io
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from tunesmith import __version__
from tunesmith.errors import ConfigError, DataError, TunesmithError
from tunesmith.ranks import is_first_process
from tunesmith.runs import PREDICTIONS_FILE, STATUS_FILE, holds_answers, to_json
from tunesmith.signals import Terminated

app = typer.Typer(
    name="tunesmith",
    help="Fine-tune language models on your own examples, and see that it worked.",
    epilog="Start: tunesmith check recipe.yaml, then tunesmith train recipe.yaml.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

WAIT_FOR_FIRST = 10.0  # seconds; torchrun ends all processes within one, once the first has failed

# --option value is not declared word by word: recipe/ reads it, with the names and types of config.py
ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}

Recipe = Annotated[str | None, typer.Argument(metavar="RECIPE", help="recipe.yaml; flags alone will do, too")]
RunOrModel = Annotated[
    str, typer.Argument(metavar="RUN_OR_MODEL", help="Run directory, model folder, Hub id or recipe")
]
Host = Annotated[
    str,
    typer.Option(
        help="127.0.0.1: this machine only. 0.0.0.0 lets others in, with a token that is printed, or TUNESMITH_TOKEN's"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object; all else goes to stderr")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose")]


class OptionsCommand(TyperCommand):
    """A command whose help lists the recipe options, read from their declaration when help is asked for."""

    groups: tuple[str, ...] = ("RunConfig", "ModelFields", "DataConfig", "TrainingFields", "DecodingConfig")

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write one section a group: `--name TYPE  text [default]`."""
        from tunesmith.config import CONFIGS
        from tunesmith.recipe import options_help

        for cls in (cls for cls in CONFIGS if cls.__name__ in self.groups):
            with formatter.section((cls.__doc__ or cls.__name__).strip().rstrip(".")):
                rows = options_help([cls])
                formatter.write_dl([(f"--{name} {kind}", f"{text} [{default}]") for name, kind, default, text in rows])
        formatter.write_paragraph()
        formatter.write_text(
            "Recipe keys and flags are the same words; a flag wins. All options of transformers' "
            "Seq2SeqTrainingArguments work too: --num_train_epochs 3, --per_device_train_batch_size 8, --seed 1, ..."
        )


class AnswerCommand(OptionsCommand):
    """A command that reads data and decoding options but trains nothing."""

    groups = ("ModelFields", "DataConfig", "DecodingConfig")


class ChatCommand(OptionsCommand):
    """A command that only loads a model and answers."""

    groups = ("ModelFields", "DecodingConfig")


class Door:
    """What the error report needs to know of a running command."""

    def __init__(self, show_traceback: bool):
        self.show_traceback = show_traceback
        self.output_dir: str | None = None


@contextlib.contextmanager
def errors_reported(show_traceback: bool) -> Iterator[Door]:
    """Turn what a command raises into a sentence on stderr and an exit code; nothing is swallowed."""
    door = Door(show_traceback)
    for name in ("accelerate", "bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)  # hints of theirs, some of which come on import
    try:
        yield door
    except Terminated as stop:
        typer.echo(f"Interrupted by {stop}.", err=True)
        raise typer.Exit(int(stop.code or 0)) from None
    except (typer.Exit, typer.Abort, SystemExit):
        raise
    except BaseException as error:
        raise typer.Exit(report(error, door)) from None


def report(error: BaseException, door: Door) -> int:
    """Say what went wrong on stderr. Returns: the exit code.

    What stops one of several processes mostly stops them all, so it is said by the first; another speaks up where
    the first did not end it meanwhile.
    """
    if not is_first_process():
        if isinstance(error, KeyboardInterrupt):
            return 130
        time.sleep(WAIT_FOR_FIRST)
        typer.echo(f"Process {os.environ['RANK']} alone failed:", err=True)
    if isinstance(error, BrokenPipeError):  # `tunesmith ... | head`: the reader left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if door.show_traceback:
        traceback.print_exception(error, file=sys.stderr)
    if isinstance(error, KeyboardInterrupt):
        typer.echo("Interrupted.", err=True)
        return 130
    typer.echo(f"{type(error).__name__}: {error}", err=True)
    if getattr(error, "source", None) and isinstance(error, DataError):
        typer.echo("Rows that cannot be used are left out, and counted, with on_bad_row: skip.", err=True)
    if isinstance(error, TunesmithError):
        return error.exit_code
    if isinstance(error, ImportError) and "pip install" in str(error):  # an option that needs another package
        return 2
    if not door.show_traceback:
        typer.echo(f"This is not a mistake in your recipe. The traceback is in {crash_file(error, door)}.", err=True)
    return 1


def crash_file(error: BaseException, door: Door) -> Path:
    """Write the traceback into the run directory; here where there is none, or none yet.

    A file in a folder that holds no run would bar the next start from it: a run wants an empty one.
    """
    run = Path(door.output_dir).expanduser() if door.output_dir else None
    path = run / "crash.txt" if run and (run / STATUS_FILE).is_file() else Path("tunesmith-crash.txt")
    path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return path


def recipe_and_flags(recipe: str | None, ctx: typer.Context) -> tuple[str | None, list[str]]:
    """The recipe and the other words. `train --packing` has no recipe: the first word is a flag."""
    if recipe is not None and recipe.startswith("-"):
        return None, [recipe, *ctx.args]
    return recipe, list(ctx.args)


def quiet_loggers() -> None:
    """Silence hints that are written while libraries are imported; reading a recipe imports some of them already."""
    for name in ("accelerate", "bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Leave the terminal to the command: other libraries' bars and hints go, their errors stay."""
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not is_first_process():  # which says it for all
        logging.getLogger("tunesmith").setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
    warnings.filterwarnings("ignore", message=".*pin_memory.*", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def quiet_workflow() -> ModuleType:
    """The workflow, with the terminal left to it."""
    quiet_libraries()
    from tunesmith import workflow

    keep_what_is_imported()
    return workflow


def quiet_delivery() -> ModuleType:
    """What hands over a model that exists, with the terminal left to it."""
    quiet_libraries()
    from tunesmith import delivery

    keep_what_is_imported()
    return delivery


def keep_what_is_imported() -> None:
    """Collect garbage again, which `main` has turned off, but never look at what is there by now."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def show_version(value: bool) -> None:
    """Print the version and stop."""
    if value:
        typer.echo(f"tunesmith {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version")
    ] = False,
) -> None:
    """Fine-tune language models on your own examples, and see that it worked."""
    quiet_loggers()


@app.command(cls=OptionsCommand, context_settings=ANY_OPTION)
def train(ctx: typer.Context, recipe: Recipe = None, show_traceback: Traceback = False) -> None:
    """Train what the recipe says: tunesmith train recipe.yaml --learning_rate 1e-4."""
    with errors_reported(show_traceback) as door:
        from tunesmith import allocator

        allocator.tune()  # the memory allocator takes its settings when torch is first imported
        from tunesmith.recipe import load_recipe

        path, flags = recipe_and_flags(recipe, ctx)
        loaded = load_recipe(path, flags=flags, task="train")
        door.output_dir = loaded.training.get("output_dir")
        workflow = quiet_workflow()
        workflow.train(loaded)


@app.command(cls=OptionsCommand, context_settings=ANY_OPTION)
def check(
    ctx: typer.Context,
    recipe: Recipe = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows to show with their trained tokens marked")] = 3,
    as_json: AsJson = False,
    show_traceback: Traceback = False,
) -> None:
    """Show what would be trained, before anything is: rows kept and dropped, lengths, a preview."""
    with errors_reported(show_traceback):
        from tunesmith.recipe import load_recipe

        path, flags = recipe_and_flags(recipe, ctx)
        loaded = load_recipe(path, flags=flags, task="check")
        workflow = quiet_workflow()
        workflow.check(loaded, rows=rows, as_json=as_json)


@app.command("eval", cls=AnswerCommand, context_settings=ANY_OPTION)
def evaluate(
    ctx: typer.Context, model: RunOrModel, as_json: AsJson = False, show_traceback: Traceback = False
) -> None:
    """Loss, perplexity and token accuracy: tunesmith eval runs/mine --eval_dataset heldout.jsonl."""
    with errors_reported(show_traceback):
        from tunesmith.recipe import load_for_model

        loaded = load_for_model(model, flags=ctx.args, task="eval")
        workflow = quiet_workflow()
        workflow.evaluate(loaded, as_json=as_json)


@app.command(cls=AnswerCommand, context_settings=ANY_OPTION)
def predict(
    ctx: typer.Context,
    model: RunOrModel,
    output: Annotated[
        Path | None,
        typer.Option(
            help=f"File for the answers; earlier ones in it are replaced. Default: {PREDICTIONS_FILE}, here or in a "
            "recipe's output_dir, if it is not there yet"
        ),
    ] = None,
    as_json: AsJson = False,
    show_traceback: Traceback = False,
) -> None:
    """Answer every held-out prompt: tunesmith predict runs/mine --eval_dataset heldout.jsonl."""
    with errors_reported(show_traceback):
        from tunesmith.recipe import load_for_model

        loaded = load_for_model(model, flags=ctx.args, task="predict")
        workflow = quiet_workflow()
        workflow.predict(loaded, output=place_of_answers(output, model, loaded), as_json=as_json)


def place_of_answers(named: Path | None, model: str, loaded: Any) -> Path:
    """Where answers go: a file that a person named, else one here or in the output_dir of a recipe.

    Answers are replaced where a person named their file, and nothing else ever is.
    """
    folder = "" if Path(model).is_dir() else loaded.training.get("output_dir") or ""
    path = named or Path(folder) / PREDICTIONS_FILE
    if is_first_process() and path.is_file() and path.stat().st_size:
        if not named:
            raise ConfigError(
                f"{path} holds answers already. Name another file with --output, or that one to replace it."
            )
        if not holds_answers(path):
            raise ConfigError(f"--output: {path} is there, and holds no answers of predict. Name another file.")
    return path


@app.command(cls=ChatCommand, context_settings=ANY_OPTION)
def chat(
    ctx: typer.Context,
    model: RunOrModel,
    system: Annotated[str | None, typer.Option(help="System message")] = None,
    show_traceback: Traceback = False,
) -> None:
    """Talk to a model: tunesmith chat runs/mine."""
    with errors_reported(show_traceback):
        from tunesmith.recipe import load_for_model

        loaded = load_for_model(model, flags=ctx.args, task="chat")
        quiet_delivery().chat(loaded, system=system)


@app.command(cls=ChatCommand, context_settings=ANY_OPTION)
def serve(
    ctx: typer.Context,
    model: RunOrModel,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; its folder's name otherwise")] = None,
    system: Annotated[str | None, typer.Option(help="System message of conversations that bring none")] = None,
    show_traceback: Traceback = False,
) -> None:
    """Answer over HTTP as OpenAI's API does, with a chat page: tunesmith serve runs/mine."""
    with errors_reported(show_traceback):
        from tunesmith.deliver.web.access import require_server
        from tunesmith.recipe import load_for_model

        require_server("serve")  # before a model is loaded for nothing
        loaded = load_for_model(model, flags=ctx.args, task="chat")
        quiet_delivery().serve(loaded, name=name or Path(model).name or model, host=host, port=port, system=system)


@app.command(cls=ChatCommand, context_settings=ANY_OPTION)
def export(
    ctx: typer.Context,
    model: RunOrModel,
    output: Annotated[
        str | None, typer.Argument(metavar="OUTPUT", help="The GGUF file; for ollama a folder; for vllm nothing")
    ] = None,
    to: Annotated[str, typer.Option(help="gguf, ollama (a GGUF file and a Modelfile) or vllm (the command)")] = "gguf",
    kind: Annotated[str, typer.Option("--type", help="Matrices in the GGUF file: f16, q8_0, bf16, f32")] = "f16",
    name: Annotated[str | None, typer.Option(help="What the model calls itself; its folder's name otherwise")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUTPUT holds")] = False,
    show_traceback: Traceback = False,
) -> None:
    """Write a model for llama.cpp, Ollama or vLLM: tunesmith export runs/mine mine.gguf."""
    with errors_reported(show_traceback):
        from tunesmith.recipe import load_for_model

        place, flags = recipe_and_flags(output, ctx)
        loaded = load_for_model(model, flags=flags, task="chat")
        named = name or Path(model).resolve().name
        path = Path(place) if place else None
        quiet_delivery().export(loaded, path, to=to, kind=kind, name=named, overwrite=overwrite)


@app.command()
def studio(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with run directories")] = Path("runs"),
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one")] = 7860,
    show_traceback: Traceback = False,
) -> None:
    """Watch, start and stop runs on a web page: tunesmith studio runs."""
    with errors_reported(show_traceback):
        from functools import partial

        from tunesmith.deliver.web.studio import studio as open_studio
        from tunesmith.recipe import load_recipe

        keep_what_is_imported()
        open_studio(folder, load=partial(load_recipe, task="train"), host=host, port=port)


@app.command("merge")
def merge_adapter(
    adapter: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="Run directory or adapter folder; several comma-separated")
    ],
    output: Annotated[Path | None, typer.Argument(metavar="OUTPUT", help="Folder for the merged model")] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model, where it is not where the adapter's config says")
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max_shard_size", "--max-shard-size", help="Largest file of weights")
    ] = "10GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUTPUT holds")] = False,
    show_traceback: Traceback = False,
) -> None:
    """Merge a LoRA adapter into its base model and check the result."""
    with errors_reported(show_traceback):
        quiet_libraries()
        from tunesmith.deliver.merge import merge

        keep_what_is_imported()
        folders = [part.strip() for part in adapter.split(",") if part.strip()]
        if output is None or Path(adapter).suffix in (".yaml", ".yml", ".json"):
            raise ConfigError(
                "merge takes two folders: tunesmith merge RUN_OR_ADAPTER OUTPUT. Of a LLaMA-Factory recipe these are "
                "its adapter_name_or_path and export_dir; --base is its model_name_or_path."
            )
        merge(folders, output, base=base, max_shard_size=max_shard_size, overwrite=overwrite)


@app.command()
def env(as_json: AsJson = False, show_traceback: Traceback = False) -> None:
    """Versions, devices and threads, for a bug report."""
    with errors_reported(show_traceback):
        workflow = quiet_workflow()
        facts = workflow.env()
        if as_json:
            typer.echo(to_json(facts, indent=2))
            return
        width = max((len(str(name)) for name in facts), default=0)
        for name, value in facts.items():
            typer.echo(f"{name:<{width}}  {value}")


@app.command()
def selfcheck(
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave a GPU alone")] = False,
    as_json: AsJson = False,
    show_traceback: Traceback = False,
) -> None:
    """Prove the promises on this machine: packed = unpacked, resumed = uninterrupted, ...; a minute, offline."""
    with errors_reported(show_traceback):
        quiet_libraries()
        from tunesmith.selfcheck import run_checks, show_checks

        keep_what_is_imported()
        found = run_checks(use_cpu=cpu)
        if as_json:
            typer.echo(to_json({"checks": found}, indent=2))
        else:
            show_checks(found)
    if not all(check.passed for check in found):
        raise typer.Exit(1)


def plain_warning(message: Warning | str, category: type[Warning], *place: Any, **kwargs: Any) -> str:
    """A warning as a sentence: where in the code it arose says nothing about a recipe."""
    return f"{'' if category is UserWarning else category.__name__ + ': '}warning: {message}\n"


def main() -> None:
    """Run the command line; `console_scripts` and `python -m tunesmith` call it."""
    gc.disable()  # nothing of what is imported is garbage, and looking takes a fifth of the time
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ?, where strict would raise
    warnings.formatwarning = plain_warning
    warnings.filterwarnings("once", category=UserWarning)  # the same words from two places are one warning
    app(prog_name="tunesmith")
