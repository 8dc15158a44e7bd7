"""A recipe file, a dict and command-line words → `Given`s, each with its line or flag. Nothing is converted yet."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tunesmith.config import ALIASES
from tunesmith.errors import ConfigError
from tunesmith.lookup import did_you_mean
from tunesmith.recipe.given import FILE, FLAG, PYTHON, Given, Problems
from tunesmith.recipe.names import annotation_of
from tunesmith.recipe.schema import kinds, takes, wanted
from tunesmith.recipe.yaml12 import Loader, scalar


def read_file(path: Path, problems: Problems) -> list[Given]:
    """The keys of a recipe file, with their lines."""
    reader = READERS.get(path.suffix.lower())
    if not path.is_file():
        what = "does not exist"
        if path.is_dir():
            what = f"is a folder. Name a .yaml or .json file; a model is named by --model_name_or_path {path}"
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
    try:
        return without_repeats(reader(text, path), problems)
    except RecursionError:
        raise ConfigError(f"{path}: its lists and mappings are nested too deep to be read. Write fewer.") from None


def read_yaml(text: str, path: Path) -> list[Given]:
    """The keys of a YAML recipe."""
    try:
        loader = Loader(text)
        node = mapping_node(loader.get_single_node(), path)
        return [
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


def read_json(text: str, path: Path) -> list[Given]:
    """The keys of a JSON recipe."""
    try:
        values = json.loads(text) if text.strip() else None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno}).") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise no_mapping(path, 1, values)
    return [Given(key, value, f"{path}:{line}", FILE, line) for key, value, line in json_items(text, path)]


def json_items(text: str, path: Path) -> Iterable[tuple[str, Any, int]]:
    """Keys, values and lines of the object in valid JSON, keys that stand twice included."""
    decode = json.JSONDecoder(object_pairs_hook=without_doubles).raw_decode
    position = SPACE.match(text, text.index("{") + 1).end()
    while text[position] != "}":
        line = text.count("\n", 0, position) + 1
        key, end = decode(text, position)
        try:
            value, end = decode(text, SPACE.match(text, text.index(":", end) + 1).end())
        except ValueError as error:
            raise ConfigError(f"{path}:{line}: {key}: {error}") from None
        yield key, value, line
        position = SPACE.match(text, end).end()
        position = SPACE.match(text, position + (text[position] == ",")).end()


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; raises ValueError where one of its keys stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        again = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"its key '{again}' stands there twice. Keep one.")
    return found


SPACE = re.compile(r"\s*")
READERS: dict[str, Callable[[str, Path], list[Given]]] = {
    ".yaml": read_yaml,
    ".yml": read_yaml,
    ".json": read_json,
}


def mapping_node(node: yaml.Node | None, path: Path) -> yaml.MappingNode:
    """The top of the document, which must be `key: value` lines."""
    if not isinstance(node, yaml.MappingNode):
        kind = None if node is None else [] if isinstance(node, yaml.SequenceNode) else ""
        raise no_mapping(path, 1 if node is None else node.start_mark.line + 1, kind)
    return node


def no_mapping(path: Path, line: int, value: Any) -> ConfigError:
    """What to say of a recipe that holds anything but keys and values."""
    if value is None:
        return ConfigError(f"{path} is empty. Write at least model_name_or_path and dataset.")
    kind = "a list" if isinstance(value, list) else "plain text"
    return ConfigError(f"{path}:{line}: expected `key: value` lines, found {kind}.")


def without_repeats(found: list[Given], problems: Problems) -> list[Given]:
    """`found` with each key once; the second of two is reported with both lines."""
    first: dict[str, Given] = {}
    for item in found:
        if (known := first.setdefault(item.spelled, item)) is not item:
            lines = f"on line {known.line} and again on line {item.line}"
            problems.add(item, f"{item.where}: key '{item.spelled}' is {lines}.", item.spelled)
    return list(first.values())


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


def read_mapping(values: Mapping[str, Any], layer: int = PYTHON) -> list[Given]:
    """Python keywords, or a recipe given as a dict (layer MAPPING)."""
    return [Given(str(key), value, f"argument {key}", layer) for key, value in values.items()]


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
            fix = f"Write --{word}." if equals else "The recipe comes first, then --option value."
            problems.add(stray, f"'{word}' is not a flag. {fix}")
        else:
            found += read_flag(flag, values, position, problems)
        position = end
    return found


def read_flag(flag: str, values: list[str], position: int, problems: Problems) -> list[Given]:
    """One flag with the words after it."""
    key = flag[2:].replace("-", "_")
    if len(values) == 1:
        return [Given(key, scalar(values[0]), flag, FLAG, position, values[0])]
    item, annotation, name = Given(key, values, flag, FLAG, position), annotation_of(key), ALIASES.get(key, key)
    anything = annotation is None or annotation is Any
    if not values:
        if annotation is None and key.startswith("no_") and bool in kinds(annotation_of(key[3:])):
            return [item._replace(spelled=key[3:], value=False)]
        if anything or bool in kinds(annotation):
            return [item._replace(value=True)]
        problems.add(item, f"{flag}: expected {wanted(annotation)} after it, found nothing.", name)
        return []
    if not anything and not takes(annotation, list):
        extra = " ".join(values)
        problems.add(
            item, f"{flag} takes one value, got '{extra}'. The recipe comes first, then --option value.", name
        )
        return []
    return [item]
