"""Which tests prove which rows of a contract, and which rows have none.

    python scripts/contract_rows.py trainer                        # the rows kept in tests/contracts/trainer.txt
    python scripts/contract_rows.py path/to/contract.md trainer    # the rows of a contract file ...
    python scripts/contract_rows.py path/to/contract.md trainer --write    # ... which are kept

A contract is Markdown; its rows are those of its tables whose first column is an id such as `A1`, and the numbered
items below a heading "Acceptance list". A test claims rows by a comment directly above it: `# trainer: D3 D5` or
`# reliability: 37, 38`. Exit code 1 if a row has no test, if a test claims a row that the
contract does not have, or if such a comment stands above no test.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent.parent / "tests"
ROW = re.compile(r"\|\s*([A-Z]+[0-9]+)\s*\|")
ITEM = re.compile(r"([0-9]+)\. ")
IDS = "((?:[ ,]+[A-Z]*[0-9]+)+)"


class Claims(NamedTuple):
    """What the comments of a tree of tests say."""

    tests: dict[str, list[str]]
    """Row → `file.py::test_name` of the tests that claim it."""
    stray: list[str]
    """`file.py:7` of each comment that stands above no test."""


def main() -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contract", nargs="*", help="contract file, where there is one, and the word of the comments")
    parser.add_argument("--write", action="store_true", help="keep the ids of the contract file in tests/contracts")
    options = parser.parse_args()
    if len(options.contract) not in (1, 2) or (options.write and len(options.contract) == 1):
        parser.error("give [contract.md] and the word of the comments; --write needs both")
    *files, word = options.contract
    kept = TESTS / "contracts" / f"{word}.txt"
    rows = contract_rows(Path(files[0]).read_text(encoding="utf-8")) if files else kept.read_text().split()
    if options.write:
        kept.parent.mkdir(exist_ok=True)
        kept.write_text("\n".join(rows) + "\n", encoding="utf-8")
    claims = find_claims(TESTS, word)
    for row in rows:
        print(f"{row:5} {', '.join(claims.tests.get(row, ['-']))}")
    problems = find_problems(rows, claims)
    print("\n".join(["", *problems]) if problems else f"\nall {len(rows)} rows have a test")
    return 1 if problems else 0


def contract_rows(text: str) -> list[str]:
    """Ids in the first column of the tables of a contract, and numbers of its acceptance list, in their order."""
    found, kind = [], ROW
    for line in text.splitlines():
        if line.startswith("#"):
            kind = ITEM if "acceptance list" in line.lower() else ROW
        found.append(kind.match(line))
    return list(dict.fromkeys(match[1] for match in found if match))


def find_claims(folder: Path, word: str) -> Claims:
    """Read every test file below `folder`."""
    claims = Claims({}, [])
    for path in sorted(folder.rglob("test_*.py")):
        name = path.relative_to(folder).as_posix()
        text = path.read_text(encoding="utf-8")
        starts = dict(test_starts(ast.parse(text)))
        lines = text.splitlines()
        for number, line in enumerate(lines, 1):
            match = re.match(rf"\s*# {re.escape(word)}:{IDS}\s*$", line)
            if match is None:
                continue
            below = number + 1
            while below <= len(lines) and lines[below - 1].lstrip().startswith("#"):  # of another contract
                below += 1
            if below not in starts:
                claims.stray.append(f"{name}:{number}")
                continue
            for row in re.split("[ ,]+", match[1].strip()):
                claims.tests.setdefault(row, []).append(f"{name}::{starts[below]}")
    return claims


def test_starts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """First line, decorators included, and name of every test function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]), node.name


def find_problems(rows: list[str], claims: Claims) -> list[str]:
    """A line for every kind of problem."""
    missing = [row for row in rows if row not in claims.tests]
    unknown = [f"{row} ({', '.join(tests)})" for row, tests in claims.tests.items() if row not in rows]
    found = {
        "rows without a test": missing,
        "rows that the contract does not have": unknown,
        "comments that stand directly above no test": claims.stray,
    }
    return [f"{len(items)} {what}: {', '.join(items)}" for what, items in found.items() if items]


if __name__ == "__main__":
    sys.exit(main())
