"""Two processes over gloo give the curve of one with the same global batch, also where rows do not come out even."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.train.ranks import RUNS, curve

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = subprocess.run(
        [*command, "-m", "tests.train.ranks", str(folder)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]


# trainer: K5
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(two_processes, tmp_path, name):
    expected = curve(name, tmp_path, ranks=1)
    for found in (ranks[name] for ranks in two_processes):
        np.testing.assert_allclose(found["logged"], expected["logged"], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found["scored"], expected["scored"], rtol=1e-5, atol=1e-5)
        assert found["weights"] == pytest.approx(expected["weights"], rel=1e-6)


# trainer: K5
def test_two_processes_save_one_adapter_and_resume(two_processes):
    for found in (ranks["resumed"] for ranks in two_processes):
        whole, again = found["losses"]
        assert again == pytest.approx(whole, rel=1e-6)
        assert found["saved_ranks"] == [8]  # twice the 4 that were trained, on the untouched base
