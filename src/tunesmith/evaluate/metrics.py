"""METRICS: how well predicted texts match the expected ones; name → function(predictions, references) → figures."""

import json
from collections.abc import Callable, Sequence
from typing import Any

Metric = Callable[[Sequence[str], Sequence[str]], dict[str, float]]


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Percent of predictions that equal their reference, spaces around both ignored.

    >>> exact_match(["4 ", "5"], ["4", "6"])
    {'exact_match': 50.0}
    """
    pairs = zip(predictions, references, strict=True)
    return {"exact_match": percent([prediction.strip() == reference.strip() for prediction, reference in pairs])}


def json_exact_match(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Percent of predictions that are the same JSON value as their reference, and percent that are JSON at all.

    Spaces and the order of keys do not count; types do: `1`, `1.0`, `true` and `"1"` are four values. Invalid JSON is
    wrong, also where the reference itself is invalid.

    >>> json_exact_match(['{"b": 2, "a": 1}', "{'a': 1}"], ['{"a": 1, "b": 2}', '{"a": 1}'])
    {'json_exact_match': 50.0, 'json_valid': 50.0}
    """
    parsed = [
        (_parse(prediction), _parse(reference)) for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {
        "json_exact_match": percent(
            [prediction is not None and prediction == reference for prediction, reference in parsed]
        ),
        "json_valid": percent([prediction is not None for prediction, _ in parsed]),
    }


def percent(hits: Sequence[bool]) -> float:
    """Share of hits as 0–100, rounded to two places; 0 for none at all."""
    return round(100 * sum(hits) / len(hits), 2) if hits else 0.0


def _parse(text: str) -> str | None:
    """A canonical spelling of the JSON value, or None. Spelled out because Python holds `1 == 1.0 == True`."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        return json.dumps(value, sort_keys=True)
    except (ValueError, RecursionError):
        return None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "json_exact_match": json_exact_match,
}
PERCENTAGES = frozenset({"exact_match", "json_exact_match", "json_valid"})  # figures shown with a percent sign
