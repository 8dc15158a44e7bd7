"""Every row of the contracts has a test, and the script that says so can fail."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("contract_rows", ROOT / "scripts" / "contract_rows.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

CONTRACT = """
| # | Symbol | Contract |
|---|---|---|
| A1 | `train()` | trains |
| A2 | `save()` | saves, see | A9 |
| B10 | x | y |
| 1.16 | gone | |

Text about A3 and | A4 | in the middle.
"""

LIST = """
## Rules
4. a rule

# 5. Acceptance list (offline)
1. For every k in 1..30:
   2 rows
**B. More**
37. Roles
38. Mixed formats

# 6. Notes
40. none
"""

TESTS = """
import pytest

# word: A1 B10
def test_one(): ...

# word: A1
@pytest.mark.gpu
@pytest.mark.parametrize("x", [1])
def test_two(x): ...

class TestMany:
    # word: C7
    def test_three(self): ...

# word: A2

def test_four(): ...

# other: A2
def test_five(): ...
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A contract and a folder of tests; `run(*arguments)` gives the script's exit code."""
    (tmp_path / "contract.md").write_text(CONTRACT)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    monkeypatch.setattr(script, "TESTS", tmp_path / "tests")

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["contract_rows.py", *arguments])
        return script.main()

    run.folder = tmp_path
    return run


def test_rows_are_the_first_columns_of_tables():
    assert script.contract_rows(CONTRACT) == ["A1", "A2", "B10"]


def test_rows_are_the_numbers_of_the_acceptance_list():
    assert script.contract_rows(LIST) == ["1", "37", "38"]


def test_items_of_a_list_are_claimed_with_commas_or_without(project):
    (project.folder / "list.md").write_text(LIST)
    (project.folder / "tests" / "test_it.py").write_text("# word: 37, 38\n# word: 1\ndef test_all(): ...\n")
    assert project(str(project.folder / "list.md"), "word") == 0
    (project.folder / "tests" / "test_it.py").write_text("# word: 1 38\ndef test_two(): ...\n")
    assert project(str(project.folder / "list.md"), "word") == 1


def test_comments_directly_above_a_test_claim_rows(project):
    claims = script.find_claims(project.folder / "tests", "word")
    assert claims.tests == {
        "A1": ["test_it.py::test_one", "test_it.py::test_two"],
        "B10": ["test_it.py::test_one"],
        "C7": ["test_it.py::test_three"],
    }
    assert claims.stray == ["test_it.py:16"]


def test_every_problem_is_printed(project, capsys):
    assert project(str(project.folder / "contract.md"), "word") == 1
    printed = capsys.readouterr().out
    assert "A2    -\n" in printed
    assert "1 rows without a test: A2" in printed
    assert "1 rows that the contract does not have: C7 (test_it.py::test_three)" in printed
    assert "1 comments that stand directly above no test: test_it.py:16" in printed


def test_a_whole_contract_is_said_to_be_whole(project, capsys):
    (project.folder / "tests" / "test_it.py").write_text("# word: A1 A2 B10\ndef test_all(): ...\n")
    assert project(str(project.folder / "contract.md"), "word", "--write") == 0
    assert "all 3 rows have a test" in capsys.readouterr().out
    assert (project.folder / "tests" / "contracts" / "word.txt").read_text() == "A1\nA2\nB10\n"
    assert project("word") == 0  # without the contract, from the ids that were kept


@pytest.mark.parametrize("kept", sorted((ROOT / "tests" / "contracts").glob("*.txt")), ids=lambda path: path.stem)
def test_no_row_is_missing(kept):
    rows = kept.read_text(encoding="utf-8").split()
    assert len(rows) > 50
    assert script.find_problems(rows, script.find_claims(ROOT / "tests", kept.stem)) == []
