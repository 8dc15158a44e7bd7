"""Every fault of `tests/faults` and its neighbours, and a table of what was tried, survived and lost.

    make faults                     # all of it: a kill at every write of a save, 500 at random moments
    python scripts/faults.py --kills 50

Exit code 1 if anything was lost.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TESTS = [
    *("tests/faults", "tests/test_checkpoints.py", "tests/train/test_contract.py", "tests/test_security.py"),
    *("tests/test_lock.py", "tests/test_bad_data.py", "tests/test_fuzz.py"),
]


class Faults:
    """A pytest plugin that counts: each case is a fault, or as many as the test says that it tried."""

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a case once it is over, or where it could not begin."""
        if report.when != "call" and not report.failed:
            return
        told = dict(report.user_properties)
        tried = told.get("tried", 1)
        lost = told.get("lost", 0) or int(report.failed)
        row = self.counts[report.nodeid.split("[")[0]]
        for place, number in enumerate((tried, tried - lost, lost)):
            row[place] += number

    def table(self) -> str:
        """Fault, tried, survived, lost; a line for each test."""
        lines = [f"{'tried':>6} {'survived':>9} {'lost':>5}  fault"]
        for name, numbers in self.counts.items():
            words = name.split("::")[-1].removeprefix("test_").replace("_", " ")
            lines.append("{:>6} {:>9} {:>5}  ".format(*numbers) + words)
        total = [sum(column) for column in zip(*self.counts.values())] or [0, 0, 0]
        return "\n".join([*lines, "{:>6} {:>9} {:>5}  in all".format(*total)])


def main() -> int:
    """Run, print the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500, help="kills at random moments [500]")
    options = parser.parse_args()
    faults = Faults()
    words = [str(ROOT / path) for path in TESTS if (ROOT / path).exists()]
    code = pytest.main([*words, "--all-faults", "--kills", str(options.kills)], plugins=[faults])
    print(faults.table())
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
