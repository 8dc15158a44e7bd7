"""The GPU table on the CPU: sides train the same rows to the same losses, rows that do not fit are told apart."""

import json
import time
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from benchmarks import gpu, gpu_models, gpu_side
from tunesmith.evaluate.flops import count_flops

TINY = {**gpu_side.DEFAULTS, "shape": "tiny", "device": "cpu", "rows": 4, "steps": 3, "untimed": 1}


def run(side, mode="full", **more):
    return gpu_side.run({**TINY, "side": side, "mode": mode, **more})


# ---- one side ----------------------------------------------------------------------------------------------------


def test_every_side_trains_the_same_rows_to_the_same_losses():
    pytest.importorskip("trl")
    options = {"options": {"bf16": False}}
    ours = run("tunesmith", **options)
    assert ours["timed_steps"] == 2
    assert ours["tokens_per_second"] > 0
    for side in ("trl", "trl_padded", "trl_varlen"):
        theirs = run(side, **options)
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-4)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)
        assert theirs["tokens_per_step"] == ours["tokens_per_step"]


def test_a_step_in_smaller_micro_batches_is_the_same_step():
    options = {"options": {"bf16": False}}
    whole, parts = run("tunesmith", **options), run("tunesmith", accumulate=2, **options)
    assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-4)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_adapters_train_on_a_base_of_random_weights(mode):
    if mode == "qlora":
        pytest.importorskip("bitsandbytes")
    found = run("tunesmith", mode)
    assert len(found["loss"]) == 3
    assert any("trainable params" in line for line in found["choices"])


def test_a_profile_is_text_and_has_no_speed(tmp_path):
    found = run("tunesmith", steps=4, profile=str(tmp_path / "profile.txt"))
    assert "tokens_per_second" not in found
    assert found["waits"] == {}
    assert "aten::mm" in (tmp_path / "profile.txt").read_text(encoding="utf-8")


def test_a_failure_is_a_line_too(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu_side", json.dumps({**TINY, "side": "tunesmith", "options": {"wrong": 1}})])
    gpu_side.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["error"] == "UnknownOption"


def test_memory_that_runs_out_is_told_apart(capsys, monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(gpu_side, "run", run_out)
    monkeypatch.setattr("sys.argv", ["gpu_side", json.dumps({**TINY, "side": "tunesmith"})])
    gpu_side.main()
    assert json.loads(capsys.readouterr().out)["error"] == "out of memory"


def test_needed_operations_are_those_that_were_counted():
    """Counted without the triangle that a causal mask leaves out, and with a head at every position."""
    sizes, length = gpu_models.SHAPES["tiny"], 20
    kinds = sizes._asdict()
    config = AutoConfig.for_model(kinds.pop("family"), **kinds)
    counted = count_flops(config, 1, length)["forward"]
    per_pair = 4 * sizes.hidden_size * sizes.num_hidden_layers
    expected = counted - 2 * sizes.vocab_size * sizes.hidden_size - per_pair * (length**2 - length * (length + 1) // 2)
    row = list(range(3, 3 + length))
    found = gpu_models.needed_flops("tiny", [row], [row])
    assert found == pytest.approx(3 * expected, rel=1e-4)  # transformers 5.17 also multiplies for its rotary angles


def test_rows_are_as_long_as_alpacas():
    lengths = [len(ids) for ids in gpu_models.make_rows("0.5b", 2_000)["input_ids"]]
    assert 180 < sum(lengths) / len(lengths) < 210
    assert max(lengths) <= 750


# ---- the table ---------------------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    options = Namespace(output=tmp_path / "gpu.json", device="cpu", shape=None)
    return gpu.table(options)


def test_names_of_rows_are_unique_and_their_sides_known(table):
    names = [row["name"] for row in table]
    assert len(set(names)) == len(names) > 30
    assert {row["side"] for row in table} == {"probe", *gpu_side.SIDES}
    known = {*gpu_side.DEFAULTS, "name", "about", "environment", "side", "shape", "mode"}
    assert all(set(row) <= known for row in table)
    assert all(row["rows"] % row.get("accumulate", 1) == 0 for row in table)


def test_what_does_not_fit_the_time_is_left_out_and_runs_the_next_time(monkeypatch, tmp_path, table):
    monkeypatch.setattr(gpu, "start", lambda row: SimpleNamespace(poll=lambda: 0))
    monkeypatch.setattr(gpu, "waited_for", lambda row, *_: {"tokens_per_second": 100, "tflops": 1.0, "took": 1.0})
    output, ran = tmp_path / "gpu.json", []
    table[0]["name"], table[0]["side"] = "first", "tunesmith"
    for seconds in (30.0, 1000.0):
        result = gpu.begun(output, "cpu")
        gpu.run_all(table[:3], result, output, time.monotonic() + seconds)
        ran.append([name for name, row in gpu.begun(output, "cpu")["rows"].items() if "left_out" not in row])
        gpu.print_table(gpu.begun(output, "cpu") | {"rows": {}})
    assert ran == [["first"], ["first", table[1]["name"], table[2]["name"]]]


def test_a_row_that_needs_too_much_memory_is_tried_in_smaller_parts(monkeypatch, table):
    answers = iter([{"error": "out of memory"}, {"error": "out of memory"}, {"tokens_per_second": 5}])
    started = []
    monkeypatch.setattr(gpu, "start", started.append)
    monkeypatch.setattr(gpu, "waited_for", lambda *_: next(answers))
    found = gpu.finish(table[1], None, time.monotonic() + 1000)
    assert [row["accumulate"] for row in started] == [2, 4]
    assert found == {"tokens_per_second": 5, "accumulate": 4, "out_of_memory_with_accumulate": [1, 2]}


def test_an_option_that_is_not_there_yet_leaves_its_row_out(monkeypatch, tmp_path, table):
    monkeypatch.setattr(gpu, "start", lambda row: SimpleNamespace(poll=lambda: 0))
    monkeypatch.setattr(gpu, "waited_for", lambda *_: {"error": "UnknownOption", "said": "no compile_layers"})
    result = gpu.begun(tmp_path / "gpu.json", "cpu")
    gpu.run_all(table[1:2], result, tmp_path / "gpu.json", time.monotonic() + 100)
    assert result["rows"][table[1]["name"]]["left_out"] == "no compile_layers"


def test_ratios_are_ours_over_each_peer_of_the_same_work():
    rows = {f"8b lora {side}": {"tokens_per_second": speed} for side, speed in (("tunesmith", 300), ("trl", 100))}
    assert gpu.ratios({**rows, "1b full trl": {"tokens_per_second": 7}}) == {"8b lora trl": 3.0}


def test_a_process_that_says_nothing_is_an_error(table):
    process = gpu.subprocess.Popen(["false"], stdin=-1, stdout=-1, text=True)
    found = gpu.waited_for(table[1], process, time.monotonic() + 100)
    assert found["error"] == "died"


def test_the_outcome_of_tests_is_read(tmp_path):
    assert gpu.outcome(tmp_path / "none.xml") == {"error": "pytest did not end"}
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure/></testcase>'
        '<testcase name="c"><skipped/></testcase></testsuite></testsuites>'
    )
    assert gpu.outcome(report) == {"ran": 2, "failed": ["b"], "skipped": 1}
