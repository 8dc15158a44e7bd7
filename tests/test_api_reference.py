"""docs/api.md says what the code says, and the code says something about every public name."""

import ast
import importlib.util
import inspect
from dataclasses import is_dataclass
from pathlib import Path

import pytest

import tunesmith
from tunesmith.config import field_docs

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("make_api_reference", ROOT / "scripts" / "make_api_reference.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

NAMES = [name for name in tunesmith.__all__ if not name.startswith("__")]
DATACLASSES = [name for name in NAMES if is_dataclass(getattr(tunesmith, name))]


def test_the_reference_is_what_the_script_makes_now():
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert written == script.reference(), "docs/api.md is out of date: run python scripts/make_api_reference.py"


def test_the_reference_names_no_object_by_its_address():
    assert " at 0x" not in script.reference()
    assert str(ROOT) not in script.reference()


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_a_docstring(name):
    assert ast.get_docstring(script.source(getattr(tunesmith, name)))
    assert f"\n## {name}\n" in script.reference()


@pytest.mark.parametrize("name", DATACLASSES)
def test_a_public_option_has_a_text(name):
    cls = getattr(tunesmith, name)
    ours = {field for base in cls.__mro__ if base.__module__.startswith("tunesmith.") for field in own(base)}
    assert {field for field in ours if not field_docs(cls).get(field)} == set()


def own(cls: type) -> list[str]:
    return [name for name in inspect.get_annotations(cls) if not name.startswith("_")]


def test_types_and_defaults_are_shown_as_written(tmp_path, monkeypatch):
    source = '''
from dataclasses import dataclass, field
from typing import Annotated, Literal
from annotated_types import Ge, Le
Way = Literal["left", "right"]
@dataclass(kw_only=True)
class Options:
    """What is chosen."""
    share: Annotated[float, Ge(0), Le(1)] | None = None
    """How much."""
    way: Way = "left"
    """Where to."""
    names: list[str] = field(default_factory=list)
    """Which."""
    needed: int
    """How many | how few."""
'''
    (tmp_path / "made_up.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    from made_up import Options

    monkeypatch.setattr(script, "OWN", "made_up")
    assert script.options(Options).splitlines()[2:] == [
        "| `share` | `float ≥ 0 ≤ 1 \\| None` | `None` | How much. |",
        "| `way` | `'left' \\| 'right'` | `'left'` | Where to. |",
        "| `names` | `list[str]` | `list` | Which. |",
        "| `needed` | `int` | required | How many \\| how few. |",
    ]
