"""The names of `trl.trainer`, for scripts that import from there; imported on first use."""

from typing import Any

import tunesmith


def __getattr__(name: str) -> Any:
    if name in tunesmith.__all__:
        return getattr(tunesmith, name)
    raise AttributeError(f"module 'tunesmith.trainer' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(tunesmith.__all__)
