"""Dataclasses become `Option`s: name, type, range, default. Nothing is declared here; config.py and transformers do.

Also what a type takes, in words, for errors and for help.
"""

import dataclasses
import enum
import types
import typing
from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, Lt

from tunesmith.config import CONFIGS, field_docs

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


class Option(NamedTuple):
    """One declared option: where it lives, its type with range, and its default."""

    name: str
    owner: type
    annotation: Any
    default: Any


@cache
def options() -> dict[str, Option]:
    """Every option: tunesmith's own, then those of transformers (imported here: it takes seconds)."""
    from transformers import Seq2SeqTrainingArguments

    theirs = {option.name: option for option in declared(Seq2SeqTrainingArguments)}
    return own_options() | {name: option for name, option in theirs.items() if name not in own_options()}


@cache
def own_options(classes: tuple[type, ...] = CONFIGS) -> dict[str, Option]:
    """Own options in the order of their declaration."""
    return {option.name: option for cls in classes for option in declared(cls)}


def declared(cls: type) -> list[Option]:
    """The init fields of a dataclass as options, with the ranges of `RANGES` added."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        annotation = hints[field.name]
        if annotation is str and field.metadata.get("choices"):  # transformers checks them on its command line only
            annotation = Literal[tuple(field.metadata["choices"])]
        if field.name in RANGES:
            annotation = Annotated[(annotation, *RANGES[field.name])]
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        found.append(Option(field.name, cls, annotation, default))
    return found


# ------------------------------------------------------------------------------------------ what a type takes


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


# ------------------------------------------------------------------------------------------ in words


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
