"""Seconds and memory to plan the packing of ten million documents into rows, and how full the rows are.

    python -m benchmarks.packing --documents 10000000

Lengths are lognormal, as those of chat data are: median 200 tokens, one in a hundred above 2,000, cut at the row's
length. Beside it, on fewer documents: TRL's `pack_dataset` on rows of these lengths (`pip install tunesmith[bench]`)
and best-fit-decreasing as textbooks write it, which looks through all open rows. Each runs in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SEED = 0


def main() -> None:
    """Run the sides, print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--capacity", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--trl", type=int, default=100_000, help="documents of TRL's run; 0: none")
    parser.add_argument("--textbook", type=int, default=5_000, help="documents of the textbook's run; 0: none")
    parser.add_argument("--alone", choices=SIDES, help="run the one side here and print its figures only")
    options = parser.parse_args()
    counts = {"tunesmith": options.documents, "trl": options.trl, "textbook": options.textbook}
    if options.alone:
        sys.stdout.write(json.dumps(measured(options.alone, counts[options.alone], options.capacity)) + "\n")
        return
    found = {side: in_a_process(side) for side, count in counts.items() if count}
    sys.stdout.write(
        f"{'side':10}{'documents':>12}{'wall s':>9}{'CPU s':>9}{'GB':>7}{'rows':>11}{'full':>9}{'us/doc':>9}\n"
    )
    for side, one in found.items():
        each = 1e6 * one["cpu"] / one["documents"]
        size = (
            f"{one['wall']:>9.2f}{one['cpu']:>9.2f}{one['gb']:>7.2f}{one['rows']:>11,}{one['full']:>9.3%}{each:>9.2f}"
        )
        sys.stdout.write(f"{side:10}{one['documents']:>12,}{size}\n")
    sys.stdout.write(json.dumps({"capacity": options.capacity, "sides": found}) + "\n")


def in_a_process(side: str) -> dict[str, Any]:
    """The figures of one side, with a peak of memory of its own."""
    command = [sys.executable, "-m", "benchmarks.packing", *sys.argv[1:], "--alone", side]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def lengths_of(count: int, capacity: int) -> np.ndarray:
    """Lengths of chat data."""
    drawn = np.random.default_rng(SEED).lognormal(mean=np.log(200), sigma=1.0, size=count)
    return np.clip(drawn, 1, capacity).astype(np.int64)


def measured(side: str, count: int, capacity: int) -> dict[str, Any]:
    """One side's figures; what it imports and is given is not timed."""
    pack = SIDES[side](lengths := lengths_of(count, capacity), capacity)
    wall, cpu = time.perf_counter(), time.process_time()
    num_rows = pack()
    return {
        "documents": count,
        "wall": round(time.perf_counter() - wall, 2),
        "cpu": round(time.process_time() - cpu, 2),
        "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,  # KiB on Linux
        "rows": num_rows,
        "full": float(lengths.sum() / (num_rows * capacity)),
    }


def with_tunesmith(lengths: np.ndarray, capacity: int) -> Callable[[], int]:
    """Rows of the plan."""
    from tunesmith.data.pack import plan_packing

    return lambda: len(plan_packing(lengths, capacity))


def with_trl(lengths: np.ndarray, capacity: int) -> Callable[[], int]:
    """Rows that `pack_dataset` makes of documents of one-byte tokens; it packs every thousand by themselves."""
    import datasets
    import pyarrow as pa
    import trl

    datasets.disable_progress_bars()
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = pa.ListArray.from_arrays(offsets, np.zeros(offsets[-1], np.int8))
    documents = datasets.Dataset(datasets.table.InMemoryTable(pa.table({"input_ids": tokens})))
    return lambda: len(trl.pack_dataset(documents, capacity, "bfd"))


def with_a_textbook(lengths: np.ndarray, capacity: int) -> Callable[[], int]:
    """Rows of the plain algorithm: the fullest open row that has room, found by looking at every one."""

    def pack() -> int:
        free: list[int] = []
        for length in sorted(lengths.tolist(), reverse=True):
            fitting = [(space, row) for row, space in enumerate(free) if space >= length]
            if fitting:
                free[min(fitting)[1]] -= length
            else:
                free.append(capacity - length)
        return len(free)

    return pack


SIDES = {"tunesmith": with_tunesmith, "trl": with_trl, "textbook": with_a_textbook}

if __name__ == "__main__":
    main()
