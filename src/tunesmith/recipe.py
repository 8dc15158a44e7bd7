"""recipe.yaml and flags → `Recipe`: every wrong key, wrong value and contradiction in one report, with file and line.

    file, Python keywords, flags ── read ──► Given ── name ──► coerce ──► settle ──► check ──► Recipe

A later layer wins: flags over keywords over the file. Relative `dataset` paths are taken from the current directory,
and from the recipe's folder where the current directory has no such file.
"""

import dataclasses
import enum
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from annotated_types import Ge, Gt, Le, Lt

from tunesmith.config import (
    ALIASES,
    CONFIGS,
    DataConfig,
    DecodingConfig,
    ModelConfig,
    Recipe,
    RunConfig,
    TrainingFields,
    field_docs,
)
from tunesmith.errors import ConfigError
from tunesmith.lookup import did_you_mean

Task = Literal["train", "check", "eval", "predict", "chat"]

FILE, PYTHON, FLAG = 0, 1, 2  # layers: the higher one wins

# Ranges of transformers' options, which declare types only; own options carry theirs in config.py.
RANGES: dict[str, tuple] = {
    "num_train_epochs": (Gt(0),),
    "max_steps": (Ge(-1),),
    "per_device_train_batch_size": (Ge(1),),
    "per_device_eval_batch_size": (Ge(1),),
    "gradient_accumulation_steps": (Ge(1),),
    "eval_accumulation_steps": (Ge(1),),
    "max_grad_norm": (Ge(0),),
    "weight_decay": (Ge(0),),
    "warmup_steps": (Ge(0),),
    "logging_steps": (Gt(0),),
    "save_steps": (Gt(0),),
    "eval_steps": (Gt(0),),
    "eval_delay": (Ge(0),),
    "save_total_limit": (Ge(1),),
    "adam_beta1": (Ge(0), Lt(1)),
    "adam_beta2": (Ge(0), Lt(1)),
    "adam_epsilon": (Gt(0),),
    "label_smoothing_factor": (Ge(0), Lt(1)),
    "neftune_noise_alpha": (Gt(0),),
    "dataloader_num_workers": (Ge(0),),
    "seed": (Ge(0), Lt(2**32)),
    "data_seed": (Ge(0), Lt(2**32)),
}

# Words that other programs or transformers know and this version does not act on: an error, never ignored.
NOT_YET: dict[str, str] = {
    "predict_with_generate": "is not implemented. `tunesmith predict` writes answers; compare_rows shows some of them",
    "do_predict": "is not implemented. After training run `tunesmith predict RUN --eval_dataset FILE --output FILE`",
    "generation_max_length": "is not implemented. Set max_new_tokens",
    "generation_num_beams": "is not implemented. Set num_beams",
    "generation_config": "is not implemented. Set max_new_tokens, temperature, top_p, ... directly",
    "warmup_ratio": "is no option of transformers 5. Write it as warmup_steps: below 1 that is a share of the run",
    "quantization_bit": "is not implemented in this version: weights are trained in full or half precision",
    "load_in_4bit": "is not implemented in this version: weights are trained in full or half precision",
    "load_in_8bit": "is not implemented in this version: weights are trained in full or half precision",
    "template": "does not exist: the tokenizer's chat template is used. chat_template names another",
    "dataset_dir": "does not exist. Write the path in dataset",
    "dataset_num_proc": "does not exist: rows are tokenized in batches, in one process",
    "preprocessing_num_workers": "does not exist: rows are tokenized in batches, in one process",
    "save_safetensors": "does not exist: weights are always saved as safetensors",
}

SECRETS = ("hub_token",)
PATHS = ("dataset", "eval_dataset", "chat_template")

LORA_KEYS = tuple(
    n for n in ModelConfig.__dataclass_fields__ if n.startswith("lora_") or n in ("use_rslora", "use_dora")
)
FREEZE_KEYS = tuple(n for n in ModelConfig.__dataclass_fields__ if n.startswith("freeze_"))
UNUSED_BY_ADAPTER = {"lora": FREEZE_KEYS, "full": LORA_KEYS + FREEZE_KEYS, "freeze": LORA_KEYS}
# Given in a higher layer, the one takes the place of the other: `--max_steps 10` over a recipe with num_train_epochs.
EITHER_OR = {
    "max_steps": ("num_train_epochs",),
    "num_train_epochs": ("max_steps",),
    "eval_dataset": ("val_size",),
    "val_size": ("eval_dataset",),
}


class Option(NamedTuple):
    """One declared option: where it lives, its type with range, and its default."""

    name: str
    owner: type
    annotation: Any
    default: Any


class Given(NamedTuple):
    """One value that a person gave."""

    spelled: str
    """The key as written."""
    value: Any
    where: str
    """`recipe.yaml:7`, `--key` or `argument key`."""
    layer: int
    line: int = 0
    text: str | None = None
    """The characters of a plain scalar, for text options: `run_name: 010`."""
    key: str = ""
    """The canonical name."""

    def says(self, sentence: str) -> str:
        """`sentence` with the place and the key in front, naming the key once."""
        return f"{self.where}: {self.spelled}: {sentence}" if self.layer == FILE else f"{self.where}: {sentence}"


class Problems:
    """What is wrong, collected so that one report names everything."""

    def __init__(self, source: str):
        self.source = source
        self.found: list[tuple[int, int, str]] = []
        self.keys: set[str] = set()

    def add(self, given: Given, message: str, key: str = "") -> None:
        """Record a message about `given`; `key` is the option that the contradiction checks then leave alone."""
        self.found.append((given.layer, given.line, message))
        self.keys.add(key or given.key)

    def raise_any(self) -> None:
        """Raise all problems as one ConfigError, in file order, flags last."""
        lines = [message for _, _, message in sorted(self.found, key=lambda problem: problem[:2])]
        if len(lines) == 1:
            raise ConfigError(lines[0])
        if lines:
            raise ConfigError("\n  ".join([f"{len(lines)} problems in {self.source}:", *lines]))


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
        given += read_mapping(path)
    given += read_mapping(overrides or {}) + read_flags(flags or [], problems)
    chosen = settle(coerce_all(named(given, problems), problems), problems)
    if isinstance(path, str | Path):
        chosen = {key: beside_recipe(item, Path(path).parent) for key, item in chosen.items()}
    check(chosen, problems, task)
    problems.raise_any()
    return build(chosen)


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
    trained: dict[str, Any] = {"model_name_or_path": str(folder), "output_dir": str(folder)}
    if (folder / "config.json").is_file():  # a whole model: its base's file and revision say nothing about it
        trained |= {"gguf_file": None, "model_revision": "main"}
    elif not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{place} is a run directory that holds no trained model. Did the run finish?")
    return load_recipe(folder / "recipe.yaml", trained, flags=flags, task=task)


# ------------------------------------------------------------------------------------------ reading


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of YAML 1.2: `1e-4` is a number, `no` and `12:30` are text, `010` is ten."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - overrides PyYAML's YAML 1.1 table

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        for key, first, line in repeated(node):
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is on line {first} and again", line)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|None|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def read_file(path: Path, problems: Problems) -> list[Given]:
    """The keys of a recipe file, with their lines."""
    reader = READERS.get(path.suffix.lower())
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        siblings = [str(p) for p in path.parent.glob("*") if p.suffix in READERS] if path.parent.is_dir() else []
        raise ConfigError(f"the recipe {path} {what}.{did_you_mean(str(path), siblings)}")
    if reader is None:
        raise ConfigError(f"{path}: a recipe's name ends in {', '.join(READERS)}.")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: the file is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error
    return reader(text, path, problems)


def read_yaml(text: str, path: Path, problems: Problems) -> list[Given]:
    """The keys of a YAML recipe; duplicates become problems that name both lines."""
    try:
        loader = _Loader(text)
        node = mapping_node(loader.get_single_node(), path)
        found = [
            Given(
                str(key.value),
                loader.construct_object(value, deep=True),
                f"{path}:{key.start_mark.line + 1}",
                FILE,
                key.start_mark.line + 1,
                value.value if isinstance(value, yaml.ScalarNode) and value.style is None else None,
            )
            for key, value in node.value
        ]
    except yaml.YAMLError as error:
        raise yaml_error(error, text, path) from error
    return without_repeats(found, node, problems)


def read_json(text: str, path: Path, problems: Problems) -> list[Given]:
    """The keys of a JSON recipe. Lines come from the YAML reader, values from the JSON one."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno}).") from error
    # JSON is YAML once tabs between its tokens are spaces; inside its strings tabs cannot stand
    node = mapping_node(_Loader(text.replace("\t", " ")).get_single_node(), path)
    lines = [(key.value, key.start_mark.line + 1) for key, _ in node.value]
    found = [Given(key, values[key], f"{path}:{line}", FILE, line) for key, line in lines]
    return without_repeats(found, node, problems)


READERS: dict[str, Callable[[str, Path, Problems], list[Given]]] = {
    ".yaml": read_yaml,
    ".yml": read_yaml,
    ".json": read_json,
}


def mapping_node(node: yaml.Node | None, path: Path) -> yaml.MappingNode:
    """The top of the document, which must be `key: value` lines."""
    if node is None:
        raise ConfigError(f"{path} is empty. Write at least model_name_or_path and dataset.")
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "plain text"
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: expected `key: value` lines, found {kind}.")
    return node


def repeated(node: yaml.MappingNode) -> Iterable[tuple[str, int, yaml.Mark]]:
    """Keys of a mapping that stand there twice: key, first line, place of the second."""
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            yield key.value, seen[key.value], key.start_mark
        elif isinstance(key, yaml.ScalarNode):
            seen[key.value] = key.start_mark.line + 1


def without_repeats(found: list[Given], node: yaml.MappingNode, problems: Problems) -> list[Given]:
    """`found` with each key once; the second of two is reported with both lines."""
    again = {mark.line + 1: (key, first) for key, first, mark in repeated(node)}
    for item in found:
        if item.line in again and again[item.line][0] == item.spelled:
            key, first = again[item.line]
            problems.add(item, f"{item.where}: key '{key}' is on line {first} and again on line {item.line}.", key)
    return list({item.spelled: item for item in reversed(found)}.values())[::-1]


def yaml_error(error: yaml.YAMLError, text: str, path: Path) -> ConfigError:
    """What the YAML parser says, in one sentence with the line."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is None:  # ReaderError: a control character
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        return ConfigError(f"{path}:{line}: not valid YAML ({getattr(error, 'reason', error)}).")
    bad_line = text.splitlines()[mark.line] if mark.line < len(text.splitlines()) else ""
    if "\t" in bad_line[: len(bad_line) - len(bad_line.lstrip())] or "'\\t'" in str(error):
        return ConfigError(f"{path}:{mark.line + 1}: a tab stands where YAML wants spaces. Replace it with spaces.")
    return ConfigError(f"{path}:{mark.line + 1}: not valid YAML ({getattr(error, 'problem', error)}).")


def read_mapping(values: Mapping[str, Any]) -> list[Given]:
    """Python keywords, or a recipe given as a dict."""
    return [Given(str(key), value, f"argument {key}", PYTHON) for key, value in values.items()]


def read_flags(words: list[str], problems: Problems) -> list[Given]:
    """Command-line words: `--key value`, `--key=value`, `--key` and `--no-key` for yes and no, `--key a b`."""
    found: list[Given] = []
    position = 0
    while position < len(words):
        word = words[position]
        flag, equals, attached = word.partition("=")
        end = position + 1
        while not equals and end < len(words) and not words[end].startswith("--"):
            end += 1
        values = [attached] if equals else words[position + 1 : end]
        stray = Given(word, None, word, FLAG, position)
        if not word.startswith("--"):
            problems.add(stray, f"'{word}' is not a flag. The recipe comes first, then --option value.")
        else:
            found += read_flag(flag, values, position, problems)
        position = end
    return found


def read_flag(flag: str, values: list[str], position: int, problems: Problems) -> list[Given]:
    """One flag with the words after it."""
    key = flag[2:].replace("-", "_")
    if len(values) == 1:
        return [Given(key, scalar(values[0]), flag, FLAG, position, values[0])]
    option = options().get(ALIASES.get(key, key))
    item = Given(key, values, flag, FLAG, position)
    if not values:
        positive = options().get(ALIASES.get(key[3:], key[3:])) if key.startswith("no_") else None
        if option is None and positive is not None and bool in kinds(positive.annotation):
            return [item._replace(spelled=key[3:], value=False)]
        if option is None or bool in kinds(option.annotation):
            return [item._replace(value=True)]
        problems.add(item, f"{flag}: expected {wanted(option.annotation)} after it, found nothing.", option.name)
        return []
    if option is not None and not takes(option.annotation, list):
        extra = " ".join(values)
        problems.add(
            item, f"{flag} takes one value, got '{extra}'. The recipe comes first, then --option value.", option.name
        )
        return []
    return [item]


def scalar(text: str) -> Any:
    """The value of a plain YAML scalar: a flag's word means what it means in a recipe."""
    loader = _Loader("")
    node = yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text)
    return loader.construct_object(node)


# ------------------------------------------------------------------------------------------ names and types


@cache
def own_options(classes: tuple[type, ...] = CONFIGS) -> dict[str, Option]:
    """Own options in the order of their declaration."""
    return {option.name: option for cls in classes for option in declared(cls)}


@cache
def options() -> dict[str, Option]:
    """Every option: tunesmith's own, then those of transformers (imported here: it takes seconds)."""
    from transformers import Seq2SeqTrainingArguments

    theirs = {option.name: option for option in declared(Seq2SeqTrainingArguments)}
    return own_options() | {name: option for name, option in theirs.items() if name not in own_options()}


def declared(cls: type) -> list[Option]:
    """The init fields of a dataclass as options, with the ranges of `RANGES` added."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        annotation = hints[field.name]
        if field.name in RANGES:
            annotation = Annotated[(annotation, *RANGES[field.name])]
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        found.append(Option(field.name, cls, annotation, default))
    return found


def named(given: list[Given], problems: Problems) -> list[Given]:
    """The values whose keys exist, under their canonical names."""
    known = options()
    result = []
    for item in given:
        key = ALIASES.get(item.spelled, item.spelled)
        if key in NOT_YET:
            if key not in known or item.value not in (known[key].default, False, None):
                problems.add(item, f"{item.where}: '{item.spelled}' {NOT_YET[key]}.", key)
        elif key in known:
            result.append(item._replace(key=key))
        else:
            hint = did_you_mean(item.spelled, [*known, *ALIASES])
            what = f"{item.where}: unknown key '{item.spelled}'"
            if item.layer != FILE:
                what = f"unknown {'flag' if item.layer == FLAG else 'option'} '{item.where.removeprefix('argument ')}'"
            nearest = hint.split("'")[1] if hint else item.spelled
            problems.add(item, f"{what}.{hint}", ALIASES.get(nearest, nearest))
    return result


def coerce_all(given: list[Given], problems: Problems) -> list[Given]:
    """The values converted to the types of their options."""
    result = []
    for item in given:
        try:
            value = coerce(item.value, options()[item.key].annotation, item.text)
            result.append(item._replace(value=value))
        except ValueError as error:
            problems.add(item, item.says(str(error)))
    return result


def coerce(value: Any, annotation: Any, text: str | None = None) -> Any:
    """`value` as the type that `annotation` names, enums as their plain text.

    Args:
        text: the characters that a person typed, used where text is wanted and YAML saw a number.

    Raises: ValueError with `expected ..., got ...` and, for a near miss of a fixed word, the nearest.

    >>> coerce("1e-4", float), coerce("q_proj,v_proj", str | list[str]), coerce(2024, str, "2024")
    (0.0001, ['q_proj', 'v_proj'], '2024')
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    try:
        prepared = prepare(value, annotation, text)
        adapter = TypeAdapter(strict_words(annotation), config=ConfigDict(arbitrary_types_allowed=True))
        result = adapter.validate_python(prepared)
    except ValidationError as error:
        out_of_range = any(e["type"].startswith(("greater_than", "less_than")) for e in error.errors())
        words = fixed_words(annotation)
        hint = did_you_mean(value, words) if isinstance(value, str) else ""
        raise ValueError(f"expected {wanted(annotation, out_of_range)}, got {shown(value, text)}.{hint}") from None
    if isinstance(result, list):
        return [item.value if isinstance(item, enum.Enum) else item for item in result]
    return result.value if isinstance(result, enum.Enum) else result


def prepare(value: Any, annotation: Any, text: str | None) -> Any:
    """`value` before its type is checked: lists and mappings written as text, numbers that stand for text."""
    kind = kinds(annotation)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    unwanted_bool = isinstance(value, bool) and bool not in kind and value not in fixed_words(annotation)
    unwanted_float = isinstance(value, float) and not math.isfinite(value)
    if text is not None and str in kind and value is not None and type(value) not in kind:
        value = text
    elif unwanted_bool or unwanted_float:
        raise ValueError(f"expected {wanted(annotation)}, got {shown(value, text)}.")
    if not isinstance(value, str):
        return value
    if value[:1] in ("[", "{") and (takes(annotation, list) or takes(annotation, dict)):
        return inline(value)
    if takes(annotation, list) and "," in value:
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if takes(annotation, list) and str not in kind else value


def inline(text: str) -> Any:
    """A list or mapping written on one line, as YAML or JSON."""
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"expected a YAML list or mapping, got {text!r} ({problem}).") from None


def kinds(annotation: Any) -> list[Any]:
    """The alternatives of a union, without `Annotated`."""
    if typing.get_origin(annotation) is Annotated:
        return kinds(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(annotation) for kind in kinds(part)]
    return [annotation]


def takes(annotation: Any, container: type) -> bool:
    """Whether a list or a mapping is among the alternatives."""
    return any(kind is container or typing.get_origin(kind) is container for kind in kinds(annotation))


def strict_words(annotation: Any) -> Any:
    """`Enum | str`, transformers' habit, as the enum alone: a misspelled word is an error here, not mid-run."""
    alternatives = kinds(annotation)
    if any(is_enum(kind) for kind in alternatives):
        return typing.Union[tuple(kind for kind in alternatives if kind is not str)]  # noqa: UP007
    return annotation


def is_enum(kind: Any) -> bool:
    """Whether an alternative is an enum class."""
    return isinstance(kind, type) and issubclass(kind, enum.Enum)


def fixed_words(annotation: Any) -> list[Any]:
    """The words of literals and enums."""
    words: list[Any] = []
    for kind in kinds(annotation):
        if typing.get_origin(kind) is Literal:
            words += typing.get_args(kind)
        elif is_enum(kind):
            words += [member.value for member in kind]
    return words


def limits(annotation: Any) -> list[Any]:
    """The range marks of an annotation, inside unions too."""
    own = list(typing.get_args(annotation)[1:]) if typing.get_origin(annotation) is Annotated else []
    if typing.get_origin(annotation) is Annotated:
        return own + limits(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [mark for part in typing.get_args(annotation) for mark in limits(part)]
    return []


def wanted(annotation: Any, with_range: bool = False) -> str:
    """What an option takes, in words: `a whole number of at least 1`."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    words = fixed_words(annotation)
    phrases = [f"one of {', '.join(str(word) for word in words)}"] if words else []
    open_text = not any(is_enum(kind) for kind in kinds(annotation))
    phrases += [names[kind] for kind in names if kind in kinds(annotation) and (kind is not str or open_text)]
    phrases += ["a list"] * takes(annotation, list) + ["a mapping"] * takes(annotation, dict)
    marks = {Ge: ("ge", "of at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}
    ranges = [f"{marks[type(m)][1]} {getattr(m, marks[type(m)][0])}" for m in limits(annotation) if type(m) in marks]
    phrase = " or ".join(phrases) or "a Python object"
    return f"{phrase} {' and '.join(ranges)}" if with_range and ranges else phrase


def shown(value: Any, text: str | None) -> str:
    """A value as an error quotes it."""
    if value is None or value == "":
        return "nothing"
    return text if text is not None and not isinstance(value, str) else repr(value)


# ------------------------------------------------------------------------------------------ layers and checks


def settle(given: list[Given], problems: Problems) -> dict[str, Given]:
    """One value a key: the highest layer's. Two spellings of one key in one layer must agree."""
    chosen: dict[str, Given] = {}
    for item in given:
        old = chosen.get(item.key)
        if old is not None and old.layer == item.layer and old.value != item.value:
            if old.spelled == item.spelled:
                problems.add(item, f"{item.where} is given twice, as {old.value!r} and as {item.value!r}.")
            else:
                place = f"{item.where}: " if item.layer == FILE else ""
                problems.add(
                    item,
                    f"{place}'{old.spelled}' ({old.where}) and '{item.spelled}' name one option and differ: "
                    f"{old.value!r} and {item.value!r}. Keep '{item.key}'.",
                )
        for replaced in replaces(item):
            if replaced in chosen and chosen[replaced].layer < item.layer:
                del chosen[replaced]
        chosen[item.key] = item
    return chosen


def replaces(item: Given) -> tuple[str, ...]:
    """Options of a lower layer that make no sense beside `item`: `--adapter full` over a recipe with lora_r."""
    if item.key == "adapter":
        return UNUSED_BY_ADAPTER.get(item.value, ())
    return EITHER_OR.get(item.key, ())


def beside_recipe(item: Given, folder: Path) -> Given:
    """A path from the file that only exists relative to the recipe's folder, as seen from here."""
    if item.layer != FILE or item.key not in PATHS or item.value is None:
        return item

    def found(path: str) -> str:
        try:
            return str(folder / path) if not Path(path).exists() and (folder / path).exists() else path
        except OSError:  # Jinja text as a file name
            return path

    value = [found(path) for path in item.value] if isinstance(item.value, list) else found(item.value)
    return item._replace(value=value)


Values = Mapping[str, Any]
Where = Mapping[str, Given]


class Rule(NamedTuple):
    """Options that contradict each other; left unchecked where one of `keys` is itself wrong."""

    keys: tuple[str, ...]
    broken: Callable[[Values, Where], Any]
    message: str
    """A sentence in which `{name}` stands for an option's value."""


def has_eval(v: Values) -> bool:
    """Whether there are held-out examples."""
    return bool(v["eval_dataset"]) or v["val_size"] > 0


def gives_any(keys: Iterable[str], given: Where) -> bool:
    """Whether one of `keys` was given a value of its own."""
    return any(differs(key, given) for key in keys)


# What no recipe file may say, for any task; then what cannot hold together in training.
SAFETY = [
    Rule(
        ("trust_remote_code",),
        lambda v, given: v["trust_remote_code"] and given["trust_remote_code"].layer == FILE,
        "a recipe may not allow a model's code to run. Remove it; pass --trust_remote_code if you trust the model.",
    )
]
CONTRADICTIONS = [
    Rule(
        ("bf16", "fp16"),
        lambda v, given: v["bf16"] and v["fp16"],
        "bf16 and fp16 cannot both be true. Keep one.",
    ),
    Rule(
        ("packing", "train_sampling_strategy"),
        lambda v, given: v["packing"] and v["train_sampling_strategy"] == "group_by_length",
        "packing fills every row, so group_by_length has nothing to group. Remove train_sampling_strategy.",
    ),
    Rule(
        ("adapter", *LORA_KEYS),
        lambda v, given: v["adapter"] in ("full", "freeze") and gives_any(LORA_KEYS, given),
        "LoRA options have no effect with adapter: {adapter}. Set adapter: lora, or remove them.",
    ),
    Rule(
        ("adapter", *FREEZE_KEYS),
        lambda v, given: v["adapter"] in ("full", "lora") and gives_any(FREEZE_KEYS, given),
        "freeze options have no effect with adapter: {adapter}. Set adapter: freeze, or remove them.",
    ),
    Rule(
        ("do_merge", "adapter"),
        lambda v, given: v["do_merge"] and v["adapter"] in ("full", "freeze"),
        "do_merge has nothing to merge with adapter: {adapter}. Remove it.",
    ),
    Rule(
        ("load_best_model_at_end", "eval_strategy"),
        lambda v, given: v["load_best_model_at_end"] and v["eval_strategy"] == "no",
        "load_best_model_at_end needs evaluations during the run. Set eval_strategy: steps or epoch.",
    ),
    Rule(
        ("eval_strategy", "eval_dataset", "val_size"),
        lambda v, given: v["eval_strategy"] != "no" and not has_eval(v),
        "eval_strategy: {eval_strategy} needs held-out examples. Set eval_dataset or val_size.",
    ),
    Rule(
        ("compare_rows", "eval_dataset", "val_size"),
        lambda v, given: v["compare_rows"] and not has_eval(v),
        "compare_rows needs held-out examples. Set eval_dataset or val_size.",
    ),
    Rule(
        ("eval_dataset", "val_size"),
        lambda v, given: v["eval_dataset"] and v["val_size"] > 0,
        "eval_dataset and val_size both say what is held out. Keep one.",
    ),
    Rule(
        ("warmup_steps", "max_steps"),
        lambda v, given: 0 < v["max_steps"] < v["warmup_steps"],
        "warmup_steps ({warmup_steps:g}) is more than max_steps ({max_steps}). Lower it.",
    ),
    Rule(
        ("max_steps", "num_train_epochs"),
        lambda v, given: v["max_steps"] > 0 and "num_train_epochs" in given,
        "max_steps and num_train_epochs both say how long to train. Keep one.",
    ),
    Rule(
        ("tokens_per_batch", "max_length"),
        lambda v, given: v["tokens_per_batch"] and v["max_length"] and v["tokens_per_batch"] < v["max_length"],
        "tokens_per_batch ({tokens_per_batch}) is below max_length ({max_length}): the longest example would not fit.",
    ),
    Rule(
        ("do_train",),
        lambda v, given: "do_train" in given and not v["do_train"],
        "do_train: false does not fit `tunesmith train`. Remove it, or use `tunesmith eval` or `tunesmith predict`.",
    ),
]

NEEDS: dict[str, tuple[str, ...]] = {
    "train": ("model_name_or_path", "dataset"),
    "check": ("model_name_or_path", "dataset"),
    "eval": ("model_name_or_path", "eval_dataset"),
    "predict": ("model_name_or_path", "eval_dataset"),
    "chat": ("model_name_or_path",),
}
HOW_TO_SET = {
    "model_name_or_path": "Name the base model: a folder or a Hub id.",
    "dataset": "Name the examples: a file, a folder or a Hub id.",
    "eval_dataset": "Name the held-out examples: --eval_dataset FILE.",
}


def check(chosen: Where, problems: Problems, task: Task) -> None:
    """Add what is missing and what contradicts itself."""
    values = {name: option.default for name, option in options().items()}
    values |= {key: item.value for key, item in chosen.items()}
    for key in NEEDS[task]:
        if not values[key] and key not in problems.keys:
            problems.found.append((9, 0, f"{problems.source}: {key} is not set. {HOW_TO_SET[key]}"))
    rules = SAFETY + (CONTRADICTIONS if task in ("train", "check") else [])
    for rule in rules:
        if not problems.keys.intersection(rule.keys) and rule.broken(values, chosen):
            given = [key for key in rule.keys if key in chosen]
            places = [chosen[key].where for key in given if differs(key, chosen) or len(given) == 1]
            message = rule.message.format_map(values)
            problems.found.append((9, 1, f"{', '.join(places) or problems.source}: {message}"))


def differs(key: str, given: Where) -> bool:
    """Whether a key was given with a value other than its default (a resolved recipe gives them all)."""
    return key in given and given[key].value != options()[key].default


# ------------------------------------------------------------------------------------------ results


def build(chosen: Where) -> Recipe:
    """The typed objects, each with the values that belong to it."""

    def part(cls: type) -> Any:
        return cls(**{option.name: chosen[option.name].value for option in declared(cls) if option.name in chosen})

    home = {name: option.owner for name, option in options().items()}
    training = [name for name in home if name in chosen and home[name] not in PARTS.values()]
    return Recipe(
        **{name: part(cls) for name, cls in PARTS.items()},
        training={name: chosen[name].value for name in training},
        given={key: item.where for key, item in chosen.items()},
    )


PARTS: dict[str, type] = {"run": RunConfig, "model": ModelConfig, "data": DataConfig, "decoding": DecodingConfig}


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Every own option and every given option of transformers: saved as recipe.yaml, it repeats the run.

    Secrets are left out, and so is `trust_remote_code: true`, which no recipe may say.
    """
    values: dict[str, Any] = {}
    for part in (recipe.run, recipe.model, recipe.data):
        values |= dataclasses.asdict(part)
    values |= {option.name: option.default for option in declared(TrainingFields)} | recipe.training
    values |= dataclasses.asdict(recipe.decoding)
    if values["trust_remote_code"]:
        del values["trust_remote_code"]
    return {key: value for key, value in values.items() if key not in SECRETS}


def options_help(classes: Iterable[type] = CONFIGS) -> list[tuple[str, str, str, str]]:
    """Name, type, default and text of every option of `classes`, for help and docs. Imports nothing heavy."""
    rows = []
    for cls in classes:
        docs = field_docs(cls)
        for option in declared(cls):
            default = "none" if option.default is None else str(option.default)
            default = default.lower() if isinstance(option.default, bool) else default
            rows.append((option.name, type_text(option.annotation), default, docs.get(option.name, "")))
    return rows


def type_text(annotation: Any) -> str:
    """A type as help shows it: `int ≥ 1`, `drop|error`, `bool`."""
    if words := fixed_words(annotation):
        return "|".join(str(word) for word in words)
    marks = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
    ranges = [f"{marks[type(m)][1]} {getattr(m, marks[type(m)][0])}" for m in limits(annotation) if type(m) in marks]
    names = [k.__name__ if isinstance(k, type) and not typing.get_args(k) else str(k) for k in kinds(annotation)]
    return " ".join([" or ".join(name for name in names if name != "NoneType"), *ranges])
