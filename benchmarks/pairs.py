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
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.training import add_steps, check_steps

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "trl", "peft", "tunesmith")
REFERENCE = "plain"
"""Says what loss and gradient norm should be; it is no peer, so once is enough."""

Rounds = list[dict[str, dict[str, Any]]]
"""The figures of each side, round by round."""


def main(name: str, description: str, mode: str, sides: Sequence[str]) -> None:
    """The command of one row of the table: run, print, save `benchmarks/results/<name>.json`."""
    parser = parser_of(name, description)
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("data", type=Path, help="JSON list of Alpaca rows")
    parser.add_argument("--sides", nargs="+", choices=sides, default=list(sides))
    add_steps(parser, steps=6, untimed=2)
    options = parser.parse_args()
    check_steps(parser, options)
    with tempfile.TemporaryDirectory() as folder:
        token_rows(options.model, options.data).save_to_disk(folder)
        how = ["--mode", mode, "--steps", str(options.steps), "--untimed", str(options.untimed)]
        words = {side: training(side, options.model, folder, *how) for side in options.sides}
        rounds = in_turn(words, options.rounds, once=[REFERENCE])
    found = summary(rounds)
    save(options.output, name, rounds, steps=options.steps, sides=found)
    print_table(found)


def parser_of(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options that all these commands have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times that each side runs")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    return parser


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


# Running ------------------------------------------------------------------------------------------------------------


def training(side: str, model: str, rows: str, *how: str) -> list[str]:
    """The words after `python -m` of one side's training."""
    return ["benchmarks.training", side, model, rows, *how]


def in_turn(sides: Mapping[str, Sequence[str]], rounds: int, *, once: Collection[str] = ()) -> Rounds:
    """Run each side, given by its words after `python -m`, in every round; those in `once` in the first alone."""
    chosen = ([side for side in sides if number == 0 or side not in once] for number in range(rounds))
    return [{side: in_a_process(side, sides[side]) for side in names} for names in chosen]


def in_a_process(side: str, words: Sequence[str]) -> dict[str, Any]:
    """The figures that a fresh process prints as its last line."""
    print(f"{datetime.now(UTC):%H:%M:%S} {side}", file=sys.stderr)
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# Figures ------------------------------------------------------------------------------------------------------------


def summary(rounds: Rounds, reference: str = REFERENCE) -> dict[str, dict[str, Any]]:
    """Medians and spread of each side, how many times as fast the first side is, and how far from `reference`."""
    first, found = next(iter(rounds[0])), {}
    for side, start in rounds[0].items():
        both = [(one[first]["tokens_per_second"], one[side]["tokens_per_second"]) for one in rounds if side in one]
        speed, speeds = spread([theirs for _, theirs in both], 1)
        ratio, ratios = spread([mine / theirs for mine, theirs in both], 2)
        found[side] = {
            "tokens_per_second": speed,
            "spread": speeds,
            "ratio": ratio,
            "ratio_spread": ratios,
            "peak_memory_gb": median(one[side]["peak_memory_gb"] for one in rounds if side in one),
            "loss": start["loss"],
            "grad_norm": start["grad_norm"],
        }
        if reference in rounds[0] and side != reference:
            found[side] |= distance(start, rounds[0][reference])
    return found


def spread(values: Sequence[float], digits: int) -> tuple[float, list[float]]:
    """The median, and the least and the most."""
    return round(median(values), digits), [round(min(values), digits), round(max(values), digits)]


def distance(side: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, list[float]]:
    """Relative differences of losses and gradient norms, step by step; none where other rows were trained."""
    if side["tokens"] != reference["tokens"]:
        return {}
    pairs = {name: zip(side[name], reference[name]) for name in ("loss", "grad_norm")}
    return {f"{name}_off": [round(abs(a / b - 1), 7) for a, b in both] for name, both in pairs.items()}


def print_table(sides: Mapping[str, Mapping[str, Any]]) -> None:
    """A line for each side; how far step 1 is from the reference."""
    first = next(iter(sides))
    head = f"{'side':16}{'tokens/s':>10}{'spread':>18}{first + ' is':>18}{'GB':>7}{'loss of step 1':>16}{'norm':>9}"
    print(head + f"{'loss off':>11}{'norm off':>11}")
    for side, one in sides.items():
        around, ratio = "{}–{}".format(*one["spread"]), f"{one['ratio']:.2f} times"
        speed, memory = one["tokens_per_second"], one["peak_memory_gb"]
        start = f"{one['loss'][0]:>16.5f}{one['grad_norm'][0]:>9.4f}"
        off = "".join(f"{one[name][0]:>11.1e}" for name in ("loss_off", "grad_norm_off") if name in one)
        print(f"{side:16}{speed:>10.1f}{around:>18}{ratio:>18}{memory:>7.2f}{start}{off}")


# Saving -------------------------------------------------------------------------------------------------------------


def save(output: Path, name: str, rounds: Rounds, **more: Any) -> None:
    """Write the result file: where, with which versions, what came out, and the figures of every run."""
    result = {"benchmark": name, **surroundings(), **more, "rounds": rounds}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


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
