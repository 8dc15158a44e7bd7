"""What is printed: JSON that programs read, terminals of any width and without colours."""

import io
import json
import re

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from tests.workplace import call
from tunesmith.cli import app

COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[0-9;]*m")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def stdout_of(*words) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.stdout


# reliability: 55, 57
def test_the_options_that_check_prints_are_those_that_the_run_saves(workplace):
    printed = json.loads(stdout_of("check", "recipe.yaml", "--json", "--learning_rate", "1e-2", "--seed", "7"))
    call("train", "recipe.yaml", "--learning_rate", "1e-2", "--seed", "7")
    assert printed["recipe"] == yaml.safe_load((workplace / "run" / "recipe.yaml").read_text())
    assert printed["data"] == json.loads((workplace / "run" / "data_report.json").read_text())
    (workplace / "printed.json").write_text(json.dumps(printed["recipe"]))
    call("train", "printed.json", "--output_dir", "again")
    one, other = ((workplace / name / "adapter_model.safetensors").read_bytes() for name in ("run", "again"))
    assert one == other


# reliability: 57
def test_figures_are_printed_as_one_json_object(workplace):
    evaluated = json.loads(stdout_of("eval", "model", "--eval_dataset", "heldout.jsonl", "--json"))
    assert {"eval_loss", "eval_perplexity"} <= evaluated.keys()
    words = ("--eval_dataset", "heldout.jsonl", "--output", "answers.jsonl", "--max_new_tokens", "2")
    assert json.loads(stdout_of("predict", "model", *words, "--json"))["predict_samples"] == 3
    assert {"python", "torch", "device"} <= json.loads(stdout_of("env", "--json")).keys()


# reliability: 57
def test_an_error_leaves_nothing_on_stdout_for_a_program_to_read(workplace):
    result = CliRunner().invoke(app, ["check", "recipe.yaml", "--json", "--learnin_rate", "1"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Did you mean 'learning_rate'?" in result.stderr


@pytest.fixture
def screen(monkeypatch):
    """Make the commands print to a terminal of a width; gives what is on it."""

    def with_width(width: int) -> io.StringIO:
        page = io.StringIO()
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setattr(
            "tunesmith.workflow.Console", lambda **how: Console(file=page, width=width, force_terminal=True, **how)
        )
        return page

    return with_width


# reliability: 57
@pytest.mark.parametrize("width", [40, 200])
def test_a_terminal_has_colours_unless_no_color_is_set(workplace, screen, monkeypatch, width):
    monkeypatch.delenv("NO_COLOR", raising=False)
    page = screen(width)
    call("check", "recipe.yaml")
    assert COLOUR.search(page.getvalue())
    plain = screen(width)
    monkeypatch.setenv("NO_COLOR", "1")
    call("check", "recipe.yaml")
    call("train", "recipe.yaml")
    assert not COLOUR.search(plain.getvalue())
    assert "16 rows read, 16 kept" in plain.getvalue()


# reliability: 57
@pytest.mark.parametrize(("width", "longest"), [(40, 40), (200, 57)])
def test_bars_and_progress_fit_the_terminal(workplace, screen, width, longest):
    page = screen(width)
    call("train", "recipe.yaml")
    lines = ESCAPE.sub("", page.getvalue().replace("\r", "\n")).splitlines()
    assert max(len(line) for line in lines if "█" in line) == longest
    assert all(len(line) <= width for line in lines if "/3 ·" in line or " gone" in line)
