from pathlib import Path

import pytest


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    """Write `recipe.yaml` (or another name) in the current directory and give its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "recipe.yaml") -> str:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write
