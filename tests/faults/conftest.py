"""How runs of the fault tests are started."""

import json
from itertools import count

import pytest

from tests.faults.runs import in_child, log_of


@pytest.fixture
def outcome_of(tmp_path, request):
    """Runs a function: here, or with `--all-faults` each time in a process of its own."""
    numbers = count()

    def run(function, *args, **kwargs):
        if not request.config.getoption("--all-faults"):
            return json.loads(json.dumps(function(*args, **kwargs)))
        told = tmp_path / f"{next(numbers)}.json"
        assert in_child(told, function, *args, **kwargs) == 0, log_of(told)
        return json.loads(told.read_text())

    return run
