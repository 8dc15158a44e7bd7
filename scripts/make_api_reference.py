"""Write docs/api.md: every public name with its arguments, text and options, and the tables behind some options.

    python scripts/make_api_reference.py

All of it is read from the source text, so every version of Python and of the libraries below writes the same file.
"""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import tunesmith
from tunesmith.config import field_docs

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "api.md"
OWN = "tunesmith"
TABLES = {
    "FORMATS": "format",
    "TEMPLATES": "chat_template",
    "ADAPTERS": "adapter",
    "LOSSES": "loss_type",
    "METRICS": "metrics",
}
INHERITED = {
    "Seq2SeqTrainer": "https://huggingface.co/docs/transformers/main_classes/trainer",
    "Seq2SeqTrainingArguments": "https://huggingface.co/docs/transformers/main_classes/trainer",
    "DataCollatorForLanguageModeling": "https://huggingface.co/docs/transformers/main_classes/data_collator",
    "IterableDataset": "https://docs.pytorch.org/docs/stable/data.html",
}


def reference() -> str:
    """The whole page."""
    names = [name for name in tunesmith.__all__ if not name.startswith("__")]
    parts = [
        "# Python API",
        "Made from the source by `python scripts/make_api_reference.py`: do not edit.",
        "\n".join(f"- [`{name}`](#{name.lower()})" for name in names),
        *(part for name in names for part in entry(name)),
        "## Tables",
        "The option takes a name from its table, or `file.py:function`.",
        *(part for table, option in TABLES.items() for part in entries(table, option)),
    ]
    return "\n\n".join(parts) + "\n"


def entry(name: str) -> Iterator[str]:
    """One public name: how it is called, what it says, its options."""
    value = getattr(tunesmith, name)
    yield f"## {name}"
    yield f"```python\nfrom tunesmith import {name}\n{signature(name, value)}```"
    yield as_markdown(inspect.getdoc(value) or "")
    if isinstance(value, type):
        for base in value.__mro__[1:]:
            if base.__name__ in INHERITED:
                package = base.__module__.partition(".")[0]
                yield f"Beside this it has everything of [`{package}.{base.__name__}`]({INHERITED[base.__name__]})."
                break
        if is_dataclass(value) and (table := options(value)):
            yield table


def signature(name: str, value: Any) -> str:
    """Arguments, one a line, with types and defaults; nothing for a class that inherits them."""
    tree = source(value)
    if isinstance(tree, ast.ClassDef):
        found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
        if not found:
            return ""
        tree = found[0]
        tree.args.args = tree.args.args[1:]  # self
    flat = f"{name}({ast.unparse(tree.args)})" + (f" -> {ast.unparse(tree.returns)}" if tree.returns else "")
    inside = re.sub(r", (?=\*|\w+(?:: |=))(?![^\[(]*[\])])", ",\n    ", ast.unparse(tree.args))
    return "\n" + (flat if len(flat) <= 100 else flat.replace(ast.unparse(tree.args), f"\n    {inside},\n", 1)) + "\n"


def as_markdown(doc: str) -> str:
    """A docstring whose indented parts and examples stay as they are written."""
    blocks = re.split(r"\n{2,}(?! )", doc)
    return "\n\n".join(f"```text\n{block}\n```" if re.search(r"^( |>>>)", block, re.M) else block for block in blocks)


def options(cls: type) -> str:
    """The options that tunesmith itself declares: name, type, default, text; nothing where it declares none."""
    docs, rows = field_docs(cls), {}
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] == OWN:
            for node in source(base).body:
                if isinstance(node, ast.AnnAssign):
                    rows[ast.unparse(node.target)] = (type_text(node.annotation, base), default_text(node.value))
    lines = [
        f"| `{name}` | `{kind}` | {default} | {cell(docs.get(name, ''))} |" for name, (kind, default) in rows.items()
    ]
    return "\n".join(["| option | type | default | meaning |", "|---|---|---|---|", *lines] if lines else [])


def type_text(annotation: ast.expr, cls: type) -> str:
    """An annotation with its bounds as signs, and the module's own aliases spelled out."""
    module = ast.parse(inspect.getsource(importlib.import_module(cls.__module__)))
    assigned = [node for node in module.body if isinstance(node, ast.Assign)]
    aliases = {ast.unparse(node.targets[0]): ast.unparse(node.value) for node in assigned}
    text = re.sub(r"\b[A-Z]\w+", lambda match: aliases.get(match[0], match[0]), ast.unparse(annotation))
    text = re.sub(r"Literal\[(.*?)\]", lambda match: match[1].replace(", ", " | "), text)
    text = re.sub(r"Annotated\[(.*?)\)\]", r"\1)", text)
    for name, sign in {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}.items():
        text = re.sub(rf", {name}\((.*?)\)", rf" {sign} \1", text)
    return cell(text)


def default_text(value: ast.expr | None) -> str:
    """A default as the source has it, that of `field(default=...)` taken out."""
    found = [keyword.value for keyword in getattr(value, "keywords", []) if keyword.arg.startswith("default")]
    return "required" if value is None else f"`{cell(ast.unparse(found[0] if found else value))}`"


def entries(table: str, option: str) -> Iterator[str]:
    """The entries of a table with what each says of itself; nothing where there is no such table."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        if re.search(rf"^{table}\b.*=", path.read_text(encoding="utf-8"), re.MULTILINE):
            module = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
            yield f"### `{option}`: {table} of `{module}`"
            found = getattr(importlib.import_module(module), table).items()
            yield "\n".join(f"- `{name}`" + (f": {text}" if (text := says(value)) else "") for name, value in found)


def says(value: Any) -> str:
    """First line of a function's docstring; the text in an entry that has one."""
    if about := getattr(value, "about", ""):
        return about
    texts = [part for part in value if isinstance(part, str)] if isinstance(value, tuple) else []
    return texts[0] if texts else (inspect.getdoc(value) or "").split("\n")[0] if inspect.isfunction(value) else ""


def cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def source(value: Any) -> Any:
    """Syntax tree of a class or a function."""
    return ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]


if __name__ == "__main__":
    TARGET.write_text(reference(), encoding="utf-8")
