"""The workflow on two processes (torchrun, gloo): the files, figures and words of one process."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.ranked_runs import ASKED, REFUSED, TRAINED
from tests.small_runs import make_workplace, read_figures, read_rows
from tunesmith import cli
from tunesmith.errors import DataError
from tunesmith.runs import read_metrics, read_status

ROOT = Path(__file__).parents[1]
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
OF_A_RANK = ("rng_state", "counters", "stream")  # of a stream on several processes the position is not kept
CLOSE = {"rel": 1e-5, "abs": 1e-5}


def start(*words: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *words], env=environment, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """What one process has done, and what two have done with the same commands."""
    found = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for folder in found:
        make_workplace(folder)
        (folder / "mine").mkdir()
        (folder / "mine" / "thesis.tex").write_text("words")
        (folder / "broken.jsonl").write_text('{"messages": [}\n')
    one, two = (start(*launcher, "-m", "tests.ranked_runs", str(folder)) for launcher, folder in zip(((), TWO), found))
    errors = [process.communicate(timeout=240)[1] for process in (one, two)]
    assert (one.returncode, two.returncode) == (0, 0), errors
    return found


def numbers(rows: list[dict]) -> list[dict]:
    """Logged figures, without those of the clock."""
    return [
        {k: v for k, v in row.items() if "_second" not in k and not k.endswith(("runtime", "mfu"))} for row in rows
    ]


def test_every_process_ends_with_the_code_of_one(folders):
    expected = dict.fromkeys((*TRAINED, *ASKED), 0) | {name: code for name, (code, _) in REFUSED.items()}
    one, two = folders
    for path in (one / "rank0.json", two / "rank0.json", two / "rank1.json"):
        assert json.loads(path.read_text()) == expected


def test_only_the_first_process_prints_and_says_what_one_says(folders):
    one, two = ((folder / "rank0.txt").read_text() for folder in folders)
    assert (folders[1] / "rank1.txt").read_text() == ""
    for words in ("rows read", "answering 3 held-out prompts", "eval loss", "merged into", "next: ", "bleu-4: "):
        assert two.count(words) == one.count(words) > 0, words


# workflow: W1
@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_log_and_score_what_one_does(folders, name):
    one, two = (numbers(read_metrics(folder / name)) for folder in folders)
    assert [row["step"] for row in two if "loss" in row] == list(range(1, 1 + max(row["step"] for row in one)))
    for ours, expected in zip(two, one, strict=True):
        assert ours == pytest.approx(expected, **CLOSE)
    for phase in ("train", "all"):
        ours, expected = (read_figures(folder / name / f"{phase}_results.json") for folder in (folders[1], folders[0]))
        assert ours == pytest.approx(expected, **CLOSE)


@pytest.mark.parametrize("name", TRAINED)
def test_two_processes_write_the_files_of_one(folders, name):
    one, two = (
        {str(path.relative_to(folder)) for path in (folder / name).rglob("*") if not path.name.startswith(OF_A_RANK)}
        for folder in folders
    )
    assert two == one
    ours, expected = (without_cache_notes(folder / name / "data_report.json") for folder in folders)
    assert ours == expected
    assert ours["train"]["rows"]["kept"] > 0
    assert read_status(folders[1] / name)["state"] == "completed"
    for path in (folders[0] / name).glob("*.safetensors"):
        ours, expected = load_file(folders[1] / name / path.name), load_file(path)
        assert all(ours[key].allclose(expected[key], atol=1e-5) for key in ours.keys() | expected.keys())


# workflow: V10
@pytest.mark.parametrize("name", TRAINED)
def test_an_adapter_spares_the_search_for_unused_parameters(folders, name):
    """What is trained whole may hold parameters that a batch does not use, such as experts."""
    options = json.loads((folders[1] / name / "training_args.json").read_text())
    lora = (folders[1] / name / "adapter_config.json").is_file()
    assert options["ddp_find_unused_parameters"] is (False if lora else None)


def without_cache_notes(path: Path) -> dict:
    """A data report; which process makes kept tokens and which reads them is decided by chance."""
    report = json.loads(path.read_text())
    for part in (report["train"], report["evaluation"]):
        part["notes"] = [note for note in part["notes"] if not note.startswith("tokens read from the cache")]
    return report


# workflow: R2 R3
@pytest.mark.parametrize(
    "file",
    [
        *(f"lora/{kind}" for kind in ("predictions_before.jsonl", "predictions_after.jsonl", "samples.jsonl")),
        "lora/generated_predictions.jsonl",
        "rm/generated_predictions.jsonl",
        "asked.jsonl",
    ],
)
def test_answers_are_those_of_one_process_each_once(folders, file):
    one, two = folders
    assert (two / file).read_bytes() == (one / file).read_bytes()
    rows = read_rows(two / file)
    assert len({(row.get("step"), row.get("index", row.get("prompt"))) for row in rows}) == len(rows) > 0


def test_a_command_on_two_processes_scores_what_one_does(folders):
    """`tunesmith eval` prints the loss, to four digits."""
    one, two = (re.findall(r"^(?:loss|perplexity) +\d\S+", (f / "rank0.txt").read_text(), re.M) for f in folders)
    assert two == one
    assert len(two) == 2


def test_processes_share_one_cache(folders):
    one, two = (sorted(path.name for path in (folder / "cache").iterdir()) for folder in folders)
    assert two == one
    assert len(two) > 4


def test_an_error_is_said_once_and_ends_all_processes_soon(folders):
    began = time.monotonic()
    words = ("train", "lora.yaml", "--dataset", "broken.jsonl", "--output_dir", "again")
    two = start(*TWO, "-m", "tunesmith", *words, cwd=folders[1])
    said = two.communicate(timeout=120)[1]
    assert said.count("broken.jsonl:1: not valid JSON") == 1
    assert re.search(r"exitcode +: 3 ", said)
    assert two.returncode != 0
    assert time.monotonic() - began < 60
    assert read_status(folders[1] / "again")["state"] == "failed"


def test_a_process_that_fails_alone_says_so(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(cli, "WAIT_FOR_FIRST", 0.0)
    assert cli.report(DataError("rows.jsonl is gone"), cli.Door(show_traceback=False)) == 3
    assert capsys.readouterr().err == "Process 1 alone failed:\nDataError: rows.jsonl is gone\n"
