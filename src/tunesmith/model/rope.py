"""Rotary positions stretched to texts longer than the model was made for; the config says it, so a saved model too."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

ANSWER_FACTOR = 2.0
"""How far a model that only answers is stretched where nobody says."""


def stretched(
    config: Any, scaling: str, factor: float | None, *, max_length: int | None, training: bool, say: Callable
) -> Any:
    """A copy of a model's config with scaled positions; the same config, and a line on why, where nothing is scaled.

    Args:
        scaling: linear, dynamic, yarn or llama3, as transformers computes them.
        factor: how many times as long; `None` is what `max_length` needs in training, rounded up, and 2 in answering.
        say: takes a line.
    """
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    layers = scaled_layers(text)
    if not layers or not longest:
        say(f"rope_scaling: {config.model_type} has no rotary positions, so nothing is stretched")
        return config
    own = next((layer["rope_type"] for layer in layers if layer.get("rope_type", "default") != "default"), None)
    if own is not None:
        say(f"rope_scaling: the model's positions are scaled already ({own}, {longest:,} tokens) and stay so")
        return config
    factor = factor or (training_factor(longest, max_length) if training else ANSWER_FACTOR)
    if factor == 1:
        say(f"rope_scaling: texts are no longer than the model's {longest:,} positions, so nothing is stretched")
        return config
    if scaling == "dynamic" and training:
        say("rope_scaling: dynamic stretches as far as the longest text of a batch, so texts depend on each other")
    say(f"rope_scaling: {scaling}, {factor:g} times the model's {longest:,} positions")
    return with_scaling(config, scaling, float(factor))


def training_factor(longest: int, max_length: int | None) -> float:
    """Whole times that `longest` positions must be stretched to hold `max_length` tokens.

    >>> training_factor(2048, 4097), training_factor(2048, 2048), training_factor(2048, None)
    (3.0, 1.0, 1.0)
    """
    return float(math.ceil(max_length / longest)) if max_length and max_length > longest else 1.0


def scaled_layers(text_config: Any) -> list[dict[str, Any]]:
    """The rotary parameters that a stretch concerns; where kinds of layers have their own, those that see all."""
    own = getattr(text_config, "rope_parameters", None) or {}
    if not any(isinstance(value, Mapping) for value in own.values()):
        return [own] if own else []
    return [own["full_attention"]] if own.get("full_attention") else [layer for layer in own.values() if layer]


def with_scaling(config: Any, scaling: str, factor: float) -> Any:
    """A copy of `config` whose positions are scaled.

    `dynamic` keeps `max_position_embeddings`: transformers begins to stretch beyond it, up to any length.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    longest = text.max_position_embeddings
    for layer in scaled_layers(text):
        layer.pop("type", None)  # the older name of rope_type
        layer |= {"rope_type": scaling, "factor": factor}
        if scaling in ("yarn", "llama3"):
            layer["original_max_position_embeddings"] = longest
        if scaling == "llama3":
            layer |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}  # Llama 3.1's
    if scaling != "dynamic":
        text.max_position_embeddings = int(longest * factor)
    return config


# ---- what an adapter's folder remembers of its base --------------------------------------------------------------


def positions(config: Any) -> dict[str, Any]:
    """What `with_positions` needs to make another config's positions those of this one."""
    text = config.get_text_config()
    names = ("rope_parameters", "max_position_embeddings")
    return {name: copy.deepcopy(getattr(text, name)) for name in names if getattr(text, name, None) is not None}


def with_positions(config: Any, remembered: Mapping[str, Any]) -> Any:
    """A copy of `config` with the positions that an adapter was trained on."""
    config = copy.deepcopy(config)
    for name, value in remembered.items():
        setattr(config.get_text_config(), name, copy.deepcopy(value))
    return config
