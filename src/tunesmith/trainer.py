"""The names of `trl.trainer`, for scripts that import from there; imported on first use."""

import importlib
from typing import Any

import tunesmith

_HOME = {
    "ConstantLengthDataset": "train.constant_length",
    "DataCollatorForCompletionOnlyLM": "train.completion_only",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"tunesmith.{_HOME[name]}"), name)
    if name in tunesmith.__all__:
        return getattr(tunesmith, name)
    raise AttributeError(f"module 'tunesmith.trainer' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*_HOME, *tunesmith.__all__})
