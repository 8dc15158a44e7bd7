"""Two processes over gloo: resumed equals uninterrupted, one signal stops both, one death ends both."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.ranks import RESUMED
from tests.faults.runs import make_run
from tunesmith.checkpoints import checkpoints, damage
from tunesmith.errors import CheckpointError

ROOT = Path(__file__).parents[2]


def on_two(folder, task):
    """Run a task of `tests.faults.ranks` on two processes. Returns: what the launcher says, and what they wrote."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words += ["-m", "tests.faults.ranks", str(folder), task]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    paths = [folder / f"{task}{rank}.json" for rank in (0, 1)]
    return done, [json.loads(path.read_text()) for path in paths if path.is_file()]


# reliability: 17
def test_two_processes_resume_bit_for_bit(tmp_path):
    done, told = on_two(tmp_path, "exact")
    assert done.returncode == 0, done.stderr[-4000:]
    for found in told:
        for step in RESUMED:
            again, whole = found[str(step)], found["whole"]
            assert again["hash"] == whole["hash"], step
            assert again["logs"] == whole["logs"]
    checkpoint = tmp_path / "exact" / "whole" / "checkpoint-3"
    assert damage(checkpoint) is None
    with pytest.raises(CheckpointError, match="processes: 2 in the checkpoint, 1 now"):
        make_run(tmp_path / "alone", gradient_accumulation_steps=4).train(str(checkpoint))


# reliability: 17 23
def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    done, told = on_two(tmp_path, "signal")
    assert done.returncode == 0, done.stderr[-4000:]
    assert told == [{"code": 143, "step": 1}] * 2
    assert list(checkpoints(tmp_path / "signal" / "run")) == [1]
    assert damage(tmp_path / "signal" / "run" / "checkpoint-1") is None


# reliability: 17
def test_a_process_that_dies_takes_the_other_with_it(tmp_path):
    begin = time.monotonic()
    done, told = on_two(tmp_path, "kill")
    assert done.returncode != 0
    assert told == []
    assert time.monotonic() - begin < 60
    for path in checkpoints(tmp_path / "kill" / "run").values():
        assert damage(path) is None
