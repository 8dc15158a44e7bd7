"""The real SmolLM2-135M-Instruct for tests marked `real`: `make test` names its folder in TUNESMITH_TEST_MODEL."""

import os
from pathlib import Path

import pytest

FOLDER = os.environ.get("TUNESMITH_TEST_MODEL", "")
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

needs_model = pytest.mark.skipif(
    not FOLDER, reason="TUNESMITH_TEST_MODEL names no folder (make test sets it where the model can be had)"
)


def shared_data(name: str) -> Path:
    """A dataset of ../shared/data; skips the test where it is not."""
    path = SHARED_DATA / name
    if not path.is_file():
        pytest.skip(f"../shared/data/{name} is not here")
    return path
