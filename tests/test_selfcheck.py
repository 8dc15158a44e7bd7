"""`tunesmith selfcheck` proves the promises, and can fail."""

import json

import pytest

from tests.test_security import run
from tunesmith import selfcheck
from tunesmith.selfcheck import CHECKS, outcome, run_checks


def test_every_promise_holds_here():
    found = run_checks(use_cpu=True)
    assert [check.name for check in found] == list(CHECKS)
    assert [check.name for check in found if not check.passed] == []
    assert {check.name: check.difference for check in found}["resumed = uninterrupted"] == 0


def test_a_promise_that_is_broken_is_shown_and_is_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(selfcheck, "CHECKS", {"one = two": lambda folder, use_cpu: 1.0})
    assert run("selfcheck", "--json") == 1
    told = json.loads(capsys.readouterr().out)["checks"]
    assert told == [{"name": "one = two", "difference": 1.0, "allowed": 1e-5, "passed": False, "note": ""}]
    assert run("selfcheck") == 1
    assert "FAIL" in capsys.readouterr().out


def test_a_check_that_breaks_has_failed():
    def breaks():
        raise RuntimeError("no such instruction")

    found = outcome("x", 1e-5, breaks)
    assert not found.passed
    assert found.note == "RuntimeError: no such instruction"


@pytest.mark.parametrize("name", ["packing", "gradient_checkpointing"])
def test_a_lever_that_changed_gradients_would_be_seen(tmp_path, monkeypatch, name):
    check = {"packing": selfcheck.packed, "gradient_checkpointing": selfcheck.checkpointed}[name]
    original = selfcheck.trained

    def trained(folder, use_cpu, **options):
        found = original(folder, use_cpu, **options)
        if name in options:
            next(iter(found.values()))[0, 0] += 1e-3
        return found

    monkeypatch.setattr(selfcheck, "trained", trained)
    assert check(tmp_path, True) == pytest.approx(1e-3, rel=0.1)
