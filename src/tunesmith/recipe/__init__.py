"""recipe.yaml and flags → `Recipe`: every wrong key, wrong value and contradiction in one report, with file and line.

    file, Python keywords, flags ─ read ─► Given ─ names ─► coerce ─► settle ─► rules ─► Recipe

    names     keys of other programs and years: llamafactory, transformers4; each has a fate (fates)
    coerce    what an option takes: schema; nested: the keys inside those that take a mapping
    rules     what contradicts itself or is missing; phases: which parts of a run are asked for

A later layer wins: flags over keywords over the file. Relative `dataset` paths are taken from the current directory,
and from the recipe's folder where the current directory has no such file.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.config import DataConfig, DecodingConfig, ModelFields, Recipe, RunConfig, TrainingFields
from tunesmith.errors import ConfigError
from tunesmith.recipe.coerce import coerce_all
from tunesmith.recipe.given import FILE, MAPPING, Given, Problems
from tunesmith.recipe.names import named
from tunesmith.recipe.nested import check_nested
from tunesmith.recipe.phases import Phases, phases
from tunesmith.recipe.read import READERS, read_file, read_flags, read_mapping
from tunesmith.recipe.rules import Task, Where, check
from tunesmith.recipe.schema import declared, options, options_help
from tunesmith.recipe.settle import settle

__all__ = [
    "Phases",
    "Recipe",
    "Task",
    "is_resolved",
    "load_for_model",
    "load_recipe",
    "options_help",
    "phases",
    "resolved",
]

SECRETS = ("hub_token", "hf_token")
PATHS = (
    "dataset",
    "eval_dataset",
    "dataset_dir",
    "checkpoint_dir",
    "chat_template",
    "deepspeed",
    "accelerator_config",
    "fsdp_config",
)
PARTS: dict[str, type] = {"run": RunConfig, "model": ModelFields, "data": DataConfig, "decoding": DecodingConfig}


def load_recipe(
    path: str | Path | Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    flags: list[str] | None = None,
    task: Task = "train",
) -> Recipe:
    """Parse a recipe (.yaml, .yml, .json, or a dict), Python overrides and command-line flags.

    Args:
        path: the recipe file or a dict; `None` where flags or overrides say everything.
        overrides: values that win over the file's, as Python keywords.
        flags: command-line words, `["--learning_rate", "1e-4", "--packing"]`; they win over all.
        task: what the recipe is for: it decides which options must be there.

    Raises: ConfigError that names every problem with its file and line.
    """
    source = str(path) if isinstance(path, str | Path) else "the options"
    problems = Problems(source)
    given: list[Given] = []
    if isinstance(path, str | Path):
        given += read_file(Path(path), problems)
    elif path is not None:
        if not isinstance(path, Mapping):
            raise ConfigError(f"expected a recipe's path or a dict of options, got {path!r}.")
        given += read_mapping(path, MAPPING)
    given += read_mapping(overrides or {}) + read_flags(flags or [], problems)
    chosen = settle(coerce_all(named(given, problems), problems), problems)
    if isinstance(path, str | Path):
        chosen = {key: beside_recipe(item, Path(path).parent) for key, item in chosen.items()}
    check_nested(chosen, problems)
    check(chosen, problems, task)
    problems.raise_any()
    return build(chosen, problems.notes)


def beside_recipe(item: Given, folder: Path) -> Given:
    """A path from the file that only exists relative to the recipe's folder, as seen from here."""
    if item.layer != FILE or item.key not in PATHS or not isinstance(item.value, str | list):
        return item

    def found(path: str) -> str:
        try:
            return str(folder / path) if not Path(path).exists() and (folder / path).exists() else path
        except OSError:  # Jinja text as a file name
            return path

    value = [found(path) for path in item.value] if isinstance(item.value, list) else found(item.value)
    return item._replace(value=value)


def build(chosen: Where, notes: list[str]) -> Recipe:
    """The typed objects, each with the values that belong to it."""

    def part(cls: type) -> Any:
        return cls(**{option.name: chosen[option.name].value for option in declared(cls) if option.name in chosen})

    home = {name: option.owner for name, option in options().items()}
    training = [name for name in home if name in chosen and home[name] not in PARTS.values()]
    return Recipe(
        **{name: part(cls) for name, cls in PARTS.items()},
        training={name: chosen[name].value for name in training},
        given={key: item.where for key, item in chosen.items()},
        notes=notes,
    )


def load_for_model(place: str | Path, *, flags: list[str] | None = None, task: Task = "eval") -> Recipe:
    """The recipe for using a model that exists already.

    Args:
        place: a run directory (its `recipe.yaml` gives the defaults, the model trained there is used), a recipe, a
            model folder or a Hub id.
    """
    folder = Path(place)
    if folder.suffix in READERS and folder.is_file():
        return load_recipe(folder, flags=flags, task=task)
    if not (folder / "recipe.yaml").is_file():
        return load_recipe(None, {"model_name_or_path": str(place)}, flags=flags, task=task)
    # what it was trained on top of is part of the model by now, or named beside its adapter
    trained: dict[str, Any] = {"model_name_or_path": str(folder), "output_dir": str(folder), "checkpoint_dir": None}
    if (folder / "config.json").is_file():  # a whole model: its base's file and revision say nothing about it
        trained |= {"gguf_file": None, "model_revision": "main"}
    elif not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{place} is a run directory that holds no trained model. Did the run finish?")
    return load_recipe(folder / "recipe.yaml", trained, flags=flags, task=task)


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Every own option and every given option of transformers: saved as recipe.yaml, it repeats the run.

    The phases are written out. Secrets are left out, and so is `trust_remote_code: true`, which no recipe may say.
    """
    values: dict[str, Any] = {}
    for part in (recipe.run, recipe.model, recipe.data):
        values |= dataclasses.asdict(part)
    values |= {option.name: option.default for option in declared(TrainingFields)} | recipe.training
    values |= dataclasses.asdict(recipe.decoding)
    values |= dict(zip(("do_train", "do_eval", "do_predict"), phases(recipe), strict=True))
    if values["trust_remote_code"]:
        del values["trust_remote_code"]
    return {key: value for key, value in values.items() if key not in SECRETS}


def is_resolved(recipe: Recipe) -> bool:
    """Whether the recipe is one that a run has written: it gives every option, and nobody chose each of them."""
    return all(option.name in recipe.given for option in declared(DataConfig))
