"""YAML text → Python values as YAML 1.2 reads them: a whole recipe, one word of a flag, a list on one line."""

import re
from collections.abc import Iterable
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """YAML with the scalars of YAML 1.2: `1e-4` is a number, `no` and `12:30` are text, `010` is ten."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - overrides PyYAML's YAML 1.1 table

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """As PyYAML, but a key that stands twice is an error."""
        for key, first, line in repeated(node):
            raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is on line {first} and again", line)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As PyYAML, but a tag that does not fit its value (`!!int abc`) is an error of YAML with its line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, AttributeError) as error:
            tag = f"!!{node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(
                None, None, f"the value is not what its tag {tag} says", node.start_mark
            ) from error


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
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def repeated(node: yaml.MappingNode) -> Iterable[tuple[str, int, yaml.Mark]]:
    """Keys of a mapping that stand there twice: key, first line, place of the second."""
    seen: dict[str, int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            yield key.value, seen[key.value], key.start_mark
        elif isinstance(key, yaml.ScalarNode):
            seen[key.value] = key.start_mark.line + 1


def scalar(text: str) -> Any:
    """The value of a plain YAML scalar: a flag's word means what it means in a recipe."""
    loader = Loader("")
    node = yaml.ScalarNode(loader.resolve(yaml.ScalarNode, text, (True, False)), text)
    try:
        return loader.construct_object(node)
    except yaml.YAMLError:  # thousands of digits
        return text


def inline(text: str) -> Any:
    """A list or mapping written on one line, as YAML or JSON."""
    try:
        return Loader(text).get_single_data()
    except (yaml.YAMLError, RecursionError) as error:
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"expected a YAML list or mapping, got {text!r} ({problem}).") from None
