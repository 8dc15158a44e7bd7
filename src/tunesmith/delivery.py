"""A model that exists, handed to people and programs: chat in the terminal, serve over HTTP, export to other forms."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from tunesmith.deliver.chat import chat as talk
from tunesmith.deliver.export import EXPORTS, check_asked, vllm_command
from tunesmith.deliver.web.serve import serve as serve_model
from tunesmith.errors import ConfigError, ModelError
from tunesmith.lookup import lookup
from tunesmith.model.chain import merged
from tunesmith.model.quantize import is_quantized
from tunesmith.recipe import Recipe
from tunesmith.steps.model import last_folder, tokenizer_of, usable_model
from tunesmith.steps.options import decoding, system_prompt


def chat(recipe: Recipe, system: str | None = None) -> None:
    """Talk to a model in the terminal."""
    refuse_to_talk(recipe)
    say = said_on(Console(stderr=True))  # in a pipe only answers are written
    for note in recipe.notes:
        say(note)
    tokenizer = tokenizer_of(recipe)
    model = usable_model(recipe, tokenizer, say)
    talk(
        model,
        tokenizer,
        system=system or system_prompt(recipe),
        decoding=decoding(recipe),
        chat_template_kwargs=recipe.training.get("chat_template_kwargs"),
        console=Console(),
    )


def serve(recipe: Recipe, *, name: str, host: str = "127.0.0.1", port: int = 8000, system: str | None = None) -> None:
    """Answer over HTTP until Ctrl-C: OpenAI-style endpoints and a chat page."""
    refuse_to_talk(recipe)
    console = Console()
    for note in recipe.notes:
        said_on(console)(note)
    tokenizer = tokenizer_of(recipe)
    serve_model(
        usable_model(recipe, tokenizer, said_on(console)),
        tokenizer,
        name=name,
        host=host,
        port=port,
        decoding=decoding(recipe),
        chat_template_kwargs=recipe.training.get("chat_template_kwargs"),
        system=system or system_prompt(recipe),
        console=console,
    )


def export(recipe: Recipe, output: Path | None, *, to: str, kind: str, name: str, overwrite: bool = False) -> Any:
    """Write a model for another program, or print the command that serves it there.

    Args:
        output: the GGUF file, or Ollama's folder; vLLM needs none.
        to: `gguf`, `ollama` or `vllm`.
        kind: how a GGUF file holds matrices.
        name: what the model calls itself.

    Returns: what `deliver.export` found, or vLLM's command.
    Raises: ConfigError for a place that is taken; ModelError for a model that cannot be written exactly.
    """
    refuse_to_talk(recipe)
    console = Console()
    if to == "vllm":
        if output is not None:
            raise ConfigError(f"--to vllm prints a command and writes no file. Leave out {output}.")
        command = vllm_command(last_folder(recipe))
        console.out(command, highlight=False)
        return command
    place = check_asked(output, to=to, kind=kind, overwrite=overwrite)
    tokenizer = tokenizer_of(recipe)
    # the base as it is stored, also where an adapter was trained on it in few bits
    whole = dataclasses.replace(recipe.model, dtype="float32", load_in_4bit=False, load_in_8bit=False)
    model = usable_model(dataclasses.replace(recipe, model=whole), tokenizer, said_on(console))
    if is_quantized(model):
        raise ModelError("a 4- or 8-bit base cannot be exported: name the model that it was quantized from.")
    plain = merged(model) if hasattr(model, "peft_config") else model
    options = {"system": system_prompt(recipe)} if to == "ollama" else {}
    write = lookup(EXPORTS, to, "--to")
    return write(plain, tokenizer, place, kind=kind, name=name, overwrite=overwrite, console=console, **options)


def refuse_to_talk(recipe: Recipe) -> None:
    """Raise ConfigError for a model that scores answers and writes none."""
    if recipe.run.stage == "rm":
        raise ConfigError(
            f"{recipe.model.model_name_or_path} is a reward model: it scores answers and writes none. "
            "`tunesmith eval` and `tunesmith predict` score pairs of answers with it."
        )


def said_on(console: Console) -> Callable[[str], None]:
    """What prints a line as it is."""
    return lambda line: console.out(line, highlight=False)
