"""The run directory: nothing of a person's is deleted, files are whole, secrets stay out."""

import json
import math
import os
import subprocess
import sys

import pytest
import yaml

from tunesmith.errors import ConfigError
from tunesmith.runs import RECIPE_HEADER, Run, prepare_output_dir, read_metrics, read_status, redact, shared_output_dir


def files(path):
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*"))


def finished_run(path):
    run = Run(prepare_output_dir(path, overwrite=False))
    run.save_recipe({"seed": 1})
    run.write_status("completed", step=30, total_steps=30)
    (path / "checkpoint-20").mkdir()
    (path / "checkpoint-20" / "model.bin").write_text("weights")
    return run


def test_a_new_folder_is_created_with_its_parents_and_left_empty(tmp_path):
    assert files(prepare_output_dir(tmp_path / "a" / "b", overwrite=False)) == []


# reliability: 22
def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match=r"out is a file\. Name a folder"):
        prepare_output_dir(tmp_path / "out", overwrite=True)
    with pytest.raises(ConfigError, match=r"cannot write to .*: Not a directory"):
        prepare_output_dir(tmp_path / "out" / "below", overwrite=False)


def test_figures_go_beside_what_a_folder_holds_but_not_into_a_file(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert files(shared_output_dir(tmp_path)) == ["mine.txt"]
    with pytest.raises(ConfigError, match=r"cannot write to .*mine\.txt: it is a file"):
        shared_output_dir(tmp_path / "mine.txt")


# reliability: 56
def test_another_run_is_described_and_both_ways_out_are_named(tmp_path):
    finished_run(tmp_path / "out")
    before = files(tmp_path)
    message = (
        r"holds another run \(completed, step 30 of 30, 1 checkpoint, the last at step 20\).*--overwrite_output_dir"
    )
    with pytest.raises(ConfigError, match=message) as error:
        prepare_output_dir(tmp_path / "out", overwrite=False)
    assert "--resume_from_checkpoint" in str(error.value)
    assert "another --output_dir" in str(error.value)
    assert files(tmp_path) == before


def test_overwrite_empties_a_run_and_keeps_what_links_point_to(tmp_path):
    finished_run(tmp_path / "out")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("{}")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "data")
    assert files(prepare_output_dir(tmp_path / "out", overwrite=True)) == []
    assert (tmp_path / "data" / "rows.jsonl").exists()


@pytest.mark.parametrize("name", ["thesis.txt", "recipe.yaml", "status.json"])
def test_overwrite_never_deletes_a_folder_that_tunesmith_did_not_write(tmp_path, name):
    (tmp_path / name).write_text("learning_rate: 1e-4\n")
    with pytest.raises(ConfigError, match="does not delete it"):
        prepare_output_dir(tmp_path, overwrite=True)
    with pytest.raises(ConfigError, match=rf"is not empty \({name}\)"):
        prepare_output_dir(tmp_path, overwrite=False)
    assert files(tmp_path) == [name]


def test_overwrite_never_deletes_the_folder_one_works_in(tmp_path, monkeypatch):
    finished_run(tmp_path / "out")
    (tmp_path / "out" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "out" / "below")
    with pytest.raises(ConfigError, match="the folder you work in"):
        prepare_output_dir("..", overwrite=True)
    assert (tmp_path / "out" / "checkpoint-20" / "model.bin").exists()


def test_a_run_that_is_still_going_is_not_overwritten(tmp_path):
    run = Run(tmp_path)
    run._status["pid"] = os.getppid()
    run.write_status("running", step=1)
    with pytest.raises(ConfigError, match="still going"):
        prepare_output_dir(tmp_path, overwrite=True)
    assert read_status(tmp_path)["step"] == 1


def test_status_keeps_its_figures_and_forgets_the_eta_at_the_end(tmp_path):
    run = Run(tmp_path)
    run.write_status("running", step=3, total_steps=9, eta_seconds=12.0)
    run.write_status("completed", step=9)
    status = read_status(tmp_path)
    assert status["state"] == "completed"
    assert (status["step"], status["total_steps"], status["pid"]) == (9, 9, os.getpid())
    assert "eta_seconds" not in status
    assert files(tmp_path) == ["status.json"]


def test_status_of_a_killed_process_reads_failed(tmp_path):
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    run = Run(tmp_path)
    run._status["pid"] = int(child.stdout)
    run.write_status("running", step=3)
    assert read_status(tmp_path)["state"] == "failed"
    assert "is gone" in read_status(tmp_path)["reason"]
    assert prepare_output_dir(tmp_path, overwrite=True) == tmp_path


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.write_status("running", step=1)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run.write_status("running", step=2)
    assert read_status(tmp_path)["step"] == 1
    assert files(tmp_path) == ["status.json"]


def test_metrics_are_strict_json_lines_in_order(tmp_path):
    np = pytest.importorskip("numpy")
    run = Run(tmp_path)
    run.log_metrics({"step": 1, "loss": np.float32(0.5), "note": "é\ud800"})
    run.log_metrics({"step": 2, "loss": float("nan")})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5, "note": "é?"}, {"step": 2, "loss": "nan"}]
    assert math.isnan(float(read_metrics(tmp_path)[1]["loss"]))


def test_a_line_that_a_crash_cut_short_spoils_no_other(tmp_path):
    run = Run(tmp_path)
    run.log_metrics({"step": 1})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    run.log_metrics({"step": 2})
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    run = Run(tmp_path)
    for step, loss in [(1, 3.0), (2, 2.0), (2, None), (3, 1.0), (2, 2.5), (3, 1.5)]:
        run.log_metrics({"step": step, "loss": loss})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 3.0), (2, 2.5), (3, 1.5)]


def test_reading_an_empty_folder_finds_nothing(tmp_path):
    assert read_status(tmp_path) is None
    assert read_metrics(tmp_path) == []


def test_the_recipe_is_saved_in_order_and_reads_back(tmp_path):
    path = Run(tmp_path).save_recipe({"stage": "sft", "learning_rate": 1e-4, "dataset": ("a", "b"), "dir": tmp_path})
    assert path.read_text().startswith(RECIPE_HEADER + "stage: sft\nlearning_rate: 0.0001\n")
    assert yaml.safe_load(path.read_text())["dataset"] == ["a", "b"]


def test_events_carry_time_kind_and_message(tmp_path):
    Run(tmp_path).event("warning", "3 rows dropped")
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert (event["kind"], event["message"]) == ("warning", "3 rows dropped")
    assert event["time"].endswith("Z")


@pytest.mark.parametrize("key", ["hub_token", "api_key", "token", "wandb-api-key", "db_password", "client_secret"])
def test_text_under_a_secret_name_is_redacted(tmp_path, key):
    path = Run(tmp_path).save_recipe({"nested": {key: "abc"}, "list": [{key: "abc"}]})
    assert yaml.safe_load(path.read_text()) == {"nested": {key: "<redacted>"}, "list": [{key: "<redacted>"}]}


@pytest.mark.parametrize("secret", ["hf_" + "aB" * 17, "sk-proj-aB3" + "x" * 20, "ghp_" + "a1" * 18, "user:pass"])
def test_a_secret_inside_any_text_is_redacted(tmp_path, secret):
    Run(tmp_path).event("note", f"from https://{secret}@host/x")
    assert secret not in (tmp_path / "events.jsonl").read_text()


def test_what_only_sounds_like_a_secret_is_kept():
    kept = {
        "eos_token": "</s>",
        "loss_per_token": 0.5,
        "hub_token": None,
        "monkey": "x",
        "model": "hf_tiny",
        "dataset": "data/sk-translations-of-2024-into-german.jsonl,data/hf_datasets_and_more_of_them.jsonl",
        "task": "ask-me-a-question",
    }
    assert redact(kept) == kept


def test_importing_runs_needs_no_torch():
    code = "import sys, tunesmith.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
