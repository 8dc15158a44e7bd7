"""Sides of a comparison in turn, round by round, each in a fresh process; ratios are taken within a round.

A machine's clock drifts, and what else runs on it changes: a ratio of two runs that follow each other holds, two
figures of different days do not.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.training import timed_steps

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "trl", "peft", "tunesmith")


def main(name: str, description: str, mode: str, sides: Sequence[str]) -> None:
    """The command of one row of the table: run, print, save `benchmarks/results/<name>.json`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("data", type=Path, help="JSON list of Alpaca rows")
    parser.add_argument("--rounds", type=int, default=5, help="times that each side runs")
    parser.add_argument("--steps", type=timed_steps, default=6, help="steps of a run; the first two are not timed")
    parser.add_argument("--sides", nargs="+", choices=sides, default=list(sides))
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        token_rows(options.model, options.data).save_to_disk(folder)
        how = ["--mode", mode, "--steps", str(options.steps)]
        rounds = [
            {side: run_side(side, options.model, folder, how) for side in options.sides} for _ in range(options.rounds)
        ]
    result = {"benchmark": name, **surroundings(), "steps": options.steps, "sides": summary(rounds), "rounds": rounds}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_table(result["sides"])


def token_rows(model: str, data: Path) -> Any:
    """The first 400 rows of the file as tunesmith tokenizes them, shuffled once."""
    import datasets

    from tunesmith.config import DataConfig
    from tunesmith.data.collect import collect
    from tunesmith.data.prepare import encode_examples
    from tunesmith.data.report import Report
    from tunesmith.model.load import load_tokenizer

    datasets.disable_progress_bars()
    examples = collect(DataConfig(dataset=str(data), max_samples=400)).train
    rows = encode_examples(examples, load_tokenizer(model), Report(), max_length=1024)
    return rows.select_columns(["input_ids", "labels"]).shuffle(seed=0).flatten_indices()


def run_side(side: str, model: str, rows: str, how: Sequence[str]) -> dict[str, Any]:
    """One run of one side."""
    print(f"{datetime.now(UTC):%H:%M:%S} {side}", file=sys.stderr)
    command = [sys.executable, "-m", "benchmarks.training", side, model, rows, *how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def surroundings() -> dict[str, Any]:
    """When, on what machine, with which versions."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "features": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags],
        },
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := version_of(name))},
    }


def version_of(package: str) -> str | None:
    """The installed version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Medians and spread of each side, and how many times as fast the first side is, round by round."""
    first, found = next(iter(rounds[0])), {}
    for side in rounds[0]:
        speeds = [one[side]["tokens_per_second"] for one in rounds]
        ratios = [one[first]["tokens_per_second"] / one[side]["tokens_per_second"] for one in rounds]
        found[side] = {
            "tokens_per_second": round(median(speeds), 1),
            "spread": [round(min(speeds), 1), round(max(speeds), 1)],
            "ratio": round(median(ratios), 2),
            "ratio_spread": [round(min(ratios), 2), round(max(ratios), 2)],
            "peak_memory_gb": median(one[side]["peak_memory_gb"] for one in rounds),
            "loss": rounds[0][side]["loss"],
            "grad_norm": rounds[0][side]["grad_norm"],
        }
    return found


def print_table(sides: dict[str, dict[str, Any]]) -> None:
    """A line for each side."""
    first = next(iter(sides))
    head = f"{'side':16}{'tokens/s':>10}{'spread':>18}{first + ' is':>18}{'GB':>7}{'loss of step 1':>16}{'norm':>9}"
    print(head)
    for side, one in sides.items():
        spread, ratio = "{}–{}".format(*one["spread"]), f"{one['ratio']:.2f} times"
        speed, memory = one["tokens_per_second"], one["peak_memory_gb"]
        start = f"{one['loss'][0]:>16.5f}{one['grad_norm'][0]:>9.4f}"
        print(f"{side:16}{speed:>10.1f}{spread:>18}{ratio:>18}{memory:>7.2f}{start}")
