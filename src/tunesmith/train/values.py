"""A value against the annotation of its option: type, fixed words, range. Right values come back, others raise."""

import numbers
import os
import types
import typing
from contextlib import suppress
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from tunesmith.errors import ConfigError
from tunesmith.lookup import did_you_mean

SIGNS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le")}


def checked(name: str, value: Any, annotation: Any) -> Any:
    """`value` as its option wants it: a path as text, a number that YAML 1.1 took for text (`2e-5`) as a number.

    Raises: ConfigError with the option, what it takes, the value, and the nearest word for a misspelled one.

    >>> checked("learning_rate", "2e-5", Annotated[float, Gt(0)])
    2e-05
    """
    kinds, marks = parts(annotation)
    words = [word for kind in kinds if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and float in kinds and str not in kinds:
        with suppress(ValueError):
            value = float(value)
    if not (value in words if isinstance(value, str) and words else is_kind(value, kinds)) or outside(value, marks):
        hint = did_you_mean(value, words) if isinstance(value, str) else ""
        raise ConfigError(f"SFTConfig: {name}: expected {wanted(kinds, marks, words)}, got {value!r}.{hint}")
    return value


def parts(annotation: Any) -> tuple[list[Any], list[Any]]:
    """The alternatives of a union and the range marks inside it."""
    if typing.get_origin(annotation) is Annotated:
        inner, *marks = typing.get_args(annotation)
        kinds, others = parts(inner)
        return kinds, marks + others
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return [annotation], []
    found = [parts(part) for part in typing.get_args(annotation)]
    return [kind for kinds, _ in found for kind in kinds], [mark for _, marks in found for mark in marks]


def is_kind(value: Any, kinds: list[Any]) -> bool:
    """Whether `value` has one of the types; whole numbers are floats too, true and false are no numbers."""
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, numbers.Integral):
        return int in kinds or float in kinds
    if isinstance(value, numbers.Real):
        return float in kinds
    return any(isinstance(value, typing.get_origin(k) or k) for k in kinds if typing.get_origin(k) is not Literal)


def outside(value: Any, marks: list[Any]) -> bool:
    """Whether a number breaks a range mark; NaN does."""
    if not isinstance(value, numbers.Real):
        return False
    holds = {Ge: lambda m: value >= m.ge, Gt: lambda m: value > m.gt, Le: lambda m: value <= m.le}
    return not all(holds[type(mark)](mark) for mark in marks)


def wanted(kinds: list[Any], marks: list[Any], words: list[Any]) -> str:
    """What an option takes: `int ≥ 2 or None`, `one of bfd, wrapped`."""
    ranges = "".join(f" {sign} {getattr(mark, key)}" for mark in marks for sign, key in [SIGNS[type(mark)]])
    names = ["one of " + ", ".join(words)] if words else []
    for kind in (kind for kind in kinds if typing.get_origin(kind) is not Literal):
        if kind is bool:
            names.append("True or False")
        elif kind in (int, float):
            names.append(kind.__name__ + ranges)
        else:
            names.append("None" if kind is types.NoneType else (typing.get_origin(kind) or kind).__name__)
    return " or ".join(names)
