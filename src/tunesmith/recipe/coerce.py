"""Values become what their options declare: `"1e-4"` a number, `q_proj,v_proj` a list. Or: what was wanted."""

import enum
import math
import os
import typing
from typing import Any

from tunesmith.lookup import did_you_mean
from tunesmith.recipe.given import Given, Problems
from tunesmith.recipe.schema import fixed_words, is_enum, kinds, options, takes, wanted
from tunesmith.recipe.yaml12 import inline

WHOLE_TEXTS = ("system_prompt",)
"""Options that take a list, but whose texts may hold commas and brackets."""


def coerce_all(given: list[Given], problems: Problems) -> list[Given]:
    """The values converted to the types of their options."""
    result = []
    for item in given:
        try:
            value = coerce(item.value, options()[item.key].annotation, item.text, whole=item.key in WHOLE_TEXTS)
            result.append(item._replace(value=value))
        except ValueError as error:
            problems.add(item, item.says(str(error)))
    return result


def coerce(value: Any, annotation: Any, text: str | None = None, *, whole: bool = False) -> Any:
    """`value` as the type that `annotation` names, enums as their plain text.

    Args:
        text: the characters that a person typed, used where text is wanted and YAML saw a number.
        whole: a text with commas is one text, not a list.

    Raises: ValueError with `expected ..., got ...` and, for a near miss of a fixed word, the nearest.

    >>> coerce("1e-4", float), coerce("q_proj,v_proj", str | list[str]), coerce(2024, str, "2024")
    (0.0001, ['q_proj', 'v_proj'], '2024')
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    try:
        prepared = prepare(value, annotation, text, whole)
        adapter = TypeAdapter(strict_words(annotation), config=ConfigDict(arbitrary_types_allowed=True))
        result = adapter.validate_python(prepared)
    except ValidationError as error:
        out_of_range = any(e["type"].startswith(("greater_than", "less_than")) for e in error.errors())
        words = [str(word) for word in fixed_words(annotation)]
        hint = did_you_mean(value, words) if isinstance(value, str) else ""
        raise ValueError(f"expected {wanted(annotation, out_of_range)}, got {shown(value, text)}.{hint}") from None
    if isinstance(result, list):
        return [item.value if isinstance(item, enum.Enum) else item for item in result]
    return result.value if isinstance(result, enum.Enum) else result


def prepare(value: Any, annotation: Any, text: str | None, whole: bool = False) -> Any:
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
    if not isinstance(value, str) or (whole and value[:2] not in ('["', "['")):
        return value
    if value[:1] in ("[", "{") and (takes(annotation, list) or takes(annotation, dict)):
        return inline(value)
    if takes(annotation, list) and "," in value:
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if takes(annotation, list) and str not in kind else value


def strict_words(annotation: Any) -> Any:
    """`Enum | str`, transformers' habit, as the enum alone: a misspelled word is an error here, not mid-run."""
    alternatives = kinds(annotation)
    if any(is_enum(kind) for kind in alternatives):
        return typing.Union[tuple(kind for kind in alternatives if kind is not str)]  # noqa: UP007
    return annotation


def shown(value: Any, text: str | None) -> str:
    """A value as an error quotes it."""
    if value is None or value == "":
        return "nothing"
    return text if text is not None and not isinstance(value, str) else repr(value)
