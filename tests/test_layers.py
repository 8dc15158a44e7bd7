"""Imports point one way, as docs and `architecture.md` draw it."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "tunesmith"

# part → the parts it may import; a part is a folder, or a module at the top level
FLOOR = {"errors", "lookup", "config"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "lookup": {"errors"},
    "allocator": set(),
    "ranks": {"errors"},
    "config": {"errors", "lookup"},
    "data": FLOOR,
    "model": FLOOR,
    "recipe": FLOOR,
    "checkpoints": {"errors"},
    "lock": {"errors"},
    "signals": set(),
    "runs": FLOOR | {"checkpoints", "lock"},
    "resume": FLOOR | {"runs", "checkpoints"},
    "evaluate": FLOOR | {"data", "model", "runs", "ranks"},
    "deliver": FLOOR | {"data", "model", "recipe", "runs", "evaluate"},
    "train": FLOOR | {"allocator", "data", "model", "runs", "checkpoints", "signals", "ranks", "evaluate", "deliver"},
    "steps": FLOOR | {"data", "model", "recipe", "runs", "ranks", "evaluate", "train", "deliver"},
    "workflow": FLOOR
    | {"model", "recipe", "runs", "resume", "lock", "signals", "ranks", "evaluate", "train", "deliver", "steps"},
    "delivery": FLOOR | {"model", "recipe", "deliver", "steps"},
    "cli": {
        "delivery",
        "errors",
        "config",
        "recipe",
        "allocator",
        "ranks",
        "runs",
        "signals",
        "selfcheck",
        "workflow",
        "deliver",
    },
    "selfcheck": {"checkpoints", "data", "train"},
    "__main__": {"cli"},
    "__init__": set(),
    "trainer": set(),
}
HEAVY = {"torch", "transformers", "peft", "accelerate"}
FILES = sorted(SOURCE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of everything imported under `tree`; `from tunesmith import x` counts as tunesmith.x."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full: from tunesmith.x import y"
            inside = node.module == "tunesmith"
            names |= {f"tunesmith.{alias.name}" for alias in node.names} if inside else {node.module}
    return names


def own_parts(tree: ast.AST) -> set[str]:
    found = {name.split(".")[1] for name in imported(tree) if name.startswith("tunesmith.")}
    return found - {"__version__"}


def at_import(tree: ast.Module) -> set[str]:
    """Top-level packages that importing the module imports, functions left out, TYPE_CHECKING blocks too."""
    statements = []
    for statement in tree.body:
        if isinstance(statement, ast.If) and "TYPE_CHECKING" in ast.dump(statement.test):
            continue
        if isinstance(statement, ast.Import | ast.ImportFrom | ast.If | ast.Try):
            statements.append(statement)
    return {name.split(".")[0] for name in imported(ast.Module(statements, []))}


def test_the_source_tree_is_found():
    assert len(FILES) > 5


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    part = part_of(path)
    assert part in ALLOWED, f"say in ALLOWED what the new part '{part}' may import"
    wrong = own_parts(ast.parse(path.read_text(encoding="utf-8"))) - ALLOWED[part] - {part}
    assert not wrong, f"{part} must not import {wrong}"


LIGHT = ("errors", "lookup", "config", "recipe", "cli", "data", "runs", "ranks", "__init__", "allocator", "trainer",
         "checkpoints", "lock", "signals", "resume")  # fmt: skip


@pytest.mark.parametrize("part", LIGHT)
def test_light_parts_import_no_heavy_library(part):
    for path in FILES:
        if part_of(path) == part:
            heavy = at_import(ast.parse(path.read_text(encoding="utf-8"))) & HEAVY
            assert not heavy, f"{path.name} imports {heavy} when it is imported"


def test_the_table_has_no_circle():
    order: list[str] = []
    while len(order) < len(ALLOWED):
        ready = [part for part, below in ALLOWED.items() if part not in order and below <= set(order)]
        assert ready, "the allowed imports go round in a circle"
        order += ready


def module_name(path: Path) -> str:
    return ".".join(["tunesmith", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")


def test_no_two_modules_import_each_other_by_any_way():
    names = {module_name(path) for path in FILES}
    below = {name: set() for name in names}
    for path in FILES:
        found = imported(ast.parse(path.read_text(encoding="utf-8")))
        below[module_name(path)] = found & names - {module_name(path), "tunesmith"}
    while below:
        ready = {name for name, needs in below.items() if not needs & below.keys()}
        assert ready, f"these modules import each other in a circle: {sorted(below)}"
        below = {name: needs for name, needs in below.items() if name not in ready}
