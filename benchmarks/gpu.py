"""The GPU table: rows in order of value, each in a process of its own, as many as fit into some minutes.

    python -m benchmarks.gpu --minutes 9 --output results/gpu.json

Written after every row, so that a kill loses nothing. A row that OUTPUT has figures of already is not run again, so
that several short sessions on a device make up one table; `--rows 8b qlora` runs the rows whose names have one of the
words. The next row's process imports its libraries while one runs, and waits.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.pairs import surroundings

SIDES = ("tunesmith", "trl_varlen", "trl", "trl_padded")
SPARE = 8.0
"""Seconds kept for writing and for processes that must be ended."""
RETRIES = 2
"""Times that a row which does not fit the memory is tried again, each time with half the micro-batch."""


def main() -> None:
    """Run what is left to run, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file, continued if it is there")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--rows", nargs="+", default=[""], help="words, one of which the name of a row has")
    parser.add_argument("--tests", type=Path, help="JUnit XML of the GPU tests, to be noted")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=("tiny",), help="every row at this shape, for a dry run")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    rows = [row for row in table(options) if any(word in row["name"] for word in options.rows)]
    result = begun(options.output, options.device)
    if options.tests:
        result["tests"] = outcome(options.tests)
    run_all(rows, result, options.output, deadline)
    write(result, options.output)
    print_table(result)


# ---- the table ---------------------------------------------------------------------------------------------------


def table(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows, the most valuable first. `about`: seconds that a row takes, a guess until it has run."""
    profile = {"profile": str(options.output.parent / "gpu-profile-{}.txt")}
    halves = {"dtype": "bfloat16", "about": 60}  # float32 masters of 8B would take 128 GB
    parts = {"accumulate": 4, "about": 60}  # 4,000 tokens of 8B fit without checkpointing, 16,000 do not
    growing = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    rows = [
        row("device", "probe", about=12),
        *(row(f"0.5b full {side}", side) for side in SIDES[:3]),
        *(row(f"1b full {side}", side, "1b") for side in SIDES[:3]),
        row("0.5b full profile", "tunesmith", **profile),
        *(row(f"8b lora {side}", side, "8b", "lora", **parts) for side in SIDES[:2]),
        row("0.5b full liger", "tunesmith", options={"use_liger_kernel": True}),
        row("0.5b full compiled", "tunesmith", options={"compile_layers": True}, untimed=8, about=60),
        row("0.5b full not compiled", "tunesmith", options={"compile_layers": False}),
        *(row(f"0.5b full {size} rows", "tunesmith", rows=size, steps=20) for size in (160, 320, 40)),
        row("8b lora trl", "trl", "8b", "lora", accumulate=4, about=90),
        row("8b full tunesmith", "tunesmith", "8b", options={"upcast_trainable": False}, **halves),
        *(row(f"8b qlora {side}", side, "8b", "qlora", **parts) for side in SIDES[:2]),
        *(row(f"0.5b full 8 rows {side}", side, rows=8, steps=60) for side in ("tunesmith", "trl")),
        *(row(f"{shape} full trl_padded", "trl_padded", shape) for shape in ("0.5b", "1b")),
        *(row(f"{shape} lora {side}", side, shape, "lora") for shape in ("0.5b", "1b") for side in SIDES[:3]),
        row("8b lora profile", "tunesmith", "8b", "lora", **parts, **profile),
        row("8b lora whole", "tunesmith", "8b", "lora", about=60),
        row("8b full trl_varlen", "trl_varlen", "8b", options={"gradient_checkpointing": True}, **halves),
        row("1b full liger", "tunesmith", "1b", options={"use_liger_kernel": True}),
        row("1b full compiled", "tunesmith", "1b", options={"compile_layers": True}, untimed=8, about=60),
        row("1b full not compiled", "tunesmith", "1b", options={"compile_layers": False}),
        *(row(f"1b full {size} rows", "tunesmith", "1b", rows=size, steps=20) for size in (160, 40)),
        row("8b lora liger", "tunesmith", "8b", "lora", options={"use_liger_kernel": True}, **parts),
        row("0.5b full no metrics", "tunesmith", options={"token_metrics": False}),
        row("0.5b full expandable", "tunesmith", environment=growing),
        row("8b lora expandable", "tunesmith", "8b", "lora", environment=growing, **parts),
    ]  # fmt: skip
    for each in rows:
        each["device"] = options.device
        if each["profile"]:
            each["profile"] = each["profile"].format(each["name"].replace(" ", "-"))
        if options.shape:
            each |= {"shape": options.shape, "rows": min(each["rows"], 16), "steps": 6, "untimed": 2}
    return rows


def row(name: str, side: str, shape: str = "0.5b", mode: str = "full", about: int = 30, **more: Any) -> dict[str, Any]:
    """What `benchmarks.gpu_side` reads, with a name and a guess of its seconds."""
    slow = {"steps": 12, "untimed": 3} if shape == "8b" else {}
    plain = {"rows": 80, "profile": None, "environment": {}}
    return {"name": name, "side": side, "shape": shape, "mode": mode, "about": about, **plain, **slow, **more}


# ---- running -----------------------------------------------------------------------------------------------------


def run_all(rows: list[dict[str, Any]], result: dict[str, Any], output: Path, deadline: float) -> None:
    """Run the rows that have no figures yet, and write after each."""
    known = {"device"} if "product_tflops" in result["device"] else set()
    known |= {name for name, figures in result["rows"].items() if "error" not in figures}
    waiting = [row for row in rows if row["name"] not in known]
    started: dict[str, subprocess.Popen] = {}
    for index, row in enumerate(waiting):
        left = deadline - time.monotonic() - SPARE
        if left < row["about"]:
            result["rows"].setdefault(
                row["name"], {"left_out": f"needs about {row['about']} s, {left:.0f} s were left"}
            )
            continue
        process = started.pop(row["name"], None) or start(row)
        following = next((one for one in waiting[index + 1 :] if one["about"] < left), None)
        if following is not None and following["name"] not in started:
            started[following["name"]] = start(following)
        figures = finish(row, process, deadline)
        if figures.get("error") == "UnknownOption":  # of a tunesmith to come
            figures = {"left_out": figures["said"]}
        if row["side"] == "probe":
            result["device"] |= figures
        else:
            result["rows"][row["name"]] = described(row) | figures
        write(result, output)
        told = {name: figures.get(name) for name in ("tokens_per_second", "peak_memory_gib", "error", "said")}
        print(f"{datetime.now(UTC):%H:%M:%S} {row['name']}: {told}", flush=True)
    for process in started.values():
        end(process)


def start(row: dict[str, Any]) -> subprocess.Popen:
    """A process that imports its libraries and waits for a line."""
    given = {key: value for key, value in row.items() if key not in ("name", "about", "environment")} | {"wait": True}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_side", json.dumps(given)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **row["environment"]},
    )  # fmt: skip


def finish(row: dict[str, Any], process: subprocess.Popen, deadline: float) -> dict[str, Any]:
    """The row's figures; where memory does not suffice, those with smaller micro-batches."""
    tried = [row.get("accumulate", 1)]
    figures = waited_for(row, process, deadline)
    while figures.get("error") == "out of memory" and len(tried) <= RETRIES:
        if deadline - time.monotonic() - SPARE < row["about"]:
            break
        tried.append(2 * tried[-1])
        figures = waited_for(row, start({**row, "accumulate": tried[-1]}), deadline)
    return figures | {"accumulate": tried[-1]} | ({"out_of_memory_with_accumulate": tried[:-1]} if tried[1:] else {})


def waited_for(row: dict[str, Any], process: subprocess.Popen, deadline: float) -> dict[str, Any]:
    """What the process prints last, or why there is nothing; it gets three times its guess, within the deadline."""
    begin = time.monotonic()
    limit = max(1.0, min(3.0 * row["about"], deadline - begin - SPARE / 2))
    try:
        printed, _ = process.communicate("go\n", timeout=limit)
        figures = json.loads(printed.splitlines()[-1])
    except subprocess.TimeoutExpired:
        figures = {"error": "stopped", "said": f"not done after {limit:.0f} s"}
    except (IndexError, ValueError):
        figures = {"error": "died", "said": f"exit code {process.returncode}, see the log"}
    finally:
        end(process)
    return figures | {"took": round(time.monotonic() - begin, 1)}


def end(process: subprocess.Popen) -> None:
    """Stop it if it runs."""
    if process.poll() is None:
        process.kill()
        process.communicate()


# ---- the result --------------------------------------------------------------------------------------------------


def begun(output: Path, device: str) -> dict[str, Any]:
    """The result so far, or an empty one."""
    if output.exists():
        result = json.loads(output.read_text(encoding="utf-8"))
        lost = [name for name, row in result["rows"].items() if "left_out" in row]
        return {**result, "rows": {name: row for name, row in result["rows"].items() if name not in lost}}
    return {"benchmark": "gpu", **surroundings(), "device": {"kind": device}, "tests": None, "ratios": {}, "rows": {}}


def described(row: dict[str, Any]) -> dict[str, Any]:
    """What of a row says what it is."""
    shown = ("side", "shape", "mode", "rows", "dtype", "options", "environment")
    return {name: row[name] for name in shown if row.get(name)} | {"date": f"{datetime.now(UTC):%Y-%m-%d}"}


def write(result: dict[str, Any], output: Path) -> None:
    """The file, whole or as it was."""
    result["ratios"] = ratios(result["rows"])
    for figures in result["rows"].values():
        for name in ("product", "nominal"):
            peak = result["device"].get(f"{name}_tflops")
            if peak and figures.get("tflops"):
                figures[f"mfu_{name}"] = round(figures["tflops"] / peak, 4)
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh = output.with_suffix(".new")
    fresh.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    fresh.replace(output)


def ratios(rows: dict[str, Any]) -> dict[str, float]:
    """How many times as fast tunesmith is as each peer of the same work."""
    found = {}
    for name, figures in rows.items():
        work, _, side = name.rpartition(" ")
        ours = rows.get(f"{work} tunesmith", {}).get("tokens_per_second")
        if side in SIDES[1:] and ours and figures.get("tokens_per_second"):
            found[name] = round(ours / figures["tokens_per_second"], 2)
    return found


def outcome(report: Path) -> dict[str, Any]:
    """How many tests ran and which failed, of a JUnit file that pytest may not have come to write."""
    if not report.exists():
        return {"error": "pytest did not end"}
    cases = list(ElementTree.parse(report).iter("testcase"))
    ended = {
        kind: [case.get("name") for case in cases if case.find(kind) is not None] for kind in ("failure", "error")
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"ran": len(cases) - skipped, "failed": ended["failure"] + ended["error"], "skipped": skipped}


def print_table(result: dict[str, Any]) -> None:
    """A line for each row."""
    print(json.dumps(result["device"]), json.dumps(result["tests"]), sep="\n")
    print(f"{'row':28}{'tokens/s':>10}{'MFU':>7}{'of 989':>8}{'GiB':>7}{'loss 1':>9}{'norm 1':>9}{'ratio':>7}")
    for name, one in result["rows"].items():
        if "tokens_per_second" not in one:
            step = f"{one.get('kernel_seconds')} s of kernels in a step of {one.get('profiled_step_seconds')} s"
            print(f"{name:28}{one.get('left_out') or one.get('error') or step} {one.get('said', '')[:90]}")
            continue
        mfu = "".join(
            f"{100 * one.get(f'mfu_{peak}', 0):>{width}.1f}" for peak, width in (("product", 7), ("nominal", 8))
        )
        start = f"{(one['loss'] or [0])[0]:>9.4f}{(one['grad_norm'] or [0])[0]:>9.4f}"
        ratio = result["ratios"].get(name, "")
        print(f"{name:28}{one['tokens_per_second']:>10,}{mfu}{one['peak_memory_gib']:>7.1f}{start}{ratio!s:>7}")


if __name__ == "__main__":
    main()
