"""Seconds from Alpaca rows to packed token rows: rendered, masked, tokenized, packed. Beside TRL for the same rows.

    python -m benchmarks.preprocess TOKENIZER_FOLDER alpaca.json --rows 100000

Sides, each in a process of its own, one after another:

    recipe    what `tunesmith train` does with the rows of a file: normalize, find duplicates, encode, pack
    cached    the same a second time, with the tokens kept by the first in a temporary folder
    trainer   what `SFTTrainer` does with a `datasets.Dataset` of prompt and completion turns
    trl       what TRL's `SFTTrainer` does with that same dataset (`pip install tunesmith[bench]`)

Every row is given a number in question and answer, so that none equals another. CPU seconds count all threads and
processes: on a machine that others use, compare those; the wall clock says what a person waits on a quiet one.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIDES = ("recipe", "cached", "trainer", "trl")


def main() -> None:
    """Run the sides, print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("data", type=Path, help="JSON list of Alpaca rows, repeated with changes")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--max_length", type=int, default=1024, help="tokens of a document and of a packed row")
    parser.add_argument("--num_proc", type=int, default=None, help="dataset_num_proc of all sides")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--alone", action="store_true", help="run the one side here and print its figures only")
    options = parser.parse_args()
    if options.alone:
        sys.stdout.write(json.dumps(MEASURES[options.sides[0]](options)) + "\n")
        return
    found = {side: in_a_process(side) for side in options.sides}
    print_table(found)
    sys.stdout.write(json.dumps({"rows": options.rows, "cores": os.cpu_count(), "sides": found}) + "\n")


def in_a_process(side: str) -> dict[str, Any]:
    """The figures of one side."""
    command = [sys.executable, "-m", "benchmarks.preprocess", *sys.argv[1:], "--alone", "--sides", side]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def print_table(found: dict[str, dict[str, Any]]) -> None:
    """One line for each side, and how many times as long TRL takes as each."""
    sys.stdout.write(
        f"{'side':10}{'wall s':>9}{'CPU s':>9}{'GiB':>7}{'tokens':>13}{'trained':>13}{'packed':>9}{'TRL':>7}\n"
    )
    for side, one in found.items():
        ratio = f"{found['trl']['cpu'] / one['cpu']:.1f}x" if "trl" in found else ""
        numbers = f"{one['tokens']:>13,}{one['trained']:>13,}{one['packed']:>9,}{ratio:>7}"
        sys.stdout.write(f"{side:10}{one['wall']:>9.1f}{one['cpu']:>9.1f}{one['gib']:>7.2f}{numbers}\n")
        for stage, (wall, cpu) in one.get("stages", {}).items():
            sys.stdout.write(f"  {stage:8}{wall:>9.1f}{cpu:>9.1f}\n")


def alpaca_rows(options: argparse.Namespace) -> list[dict[str, str]]:
    """The rows of the file over and over, each with its number."""
    rows = json.loads(options.data.read_text(encoding="utf-8"))
    many = (rows[index % len(rows)] for index in range(options.rows))
    return [
        {
            "instruction": f"{row['instruction']} ({index})",
            "input": row.get("input", ""),
            "output": f"{index}: {row['output']}",
        }
        for index, row in enumerate(many)
    ]


class Stages:
    """Wall and CPU seconds from one call to the next, by name."""

    def __init__(self):
        self.seconds: dict[str, tuple[float, float]] = {}
        self.last = self.now()

    @staticmethod
    def now() -> tuple[float, float]:
        """Wall clock, and CPU seconds of this process and its ended children."""
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)

    def ended(self, name: str) -> None:
        """What went on since the last call was this."""
        now = self.now()
        self.seconds[name] = tuple(round(a - b, 2) for a, b in zip(now, self.last))
        self.last = now

    def figures(self, packed: Any) -> dict[str, Any]:
        """All of it, and counts of the packed rows."""
        import pyarrow.compute as pc

        table = packed.with_format("arrow")[:]
        labels = pc.list_flatten(table["labels"])
        wall, cpu = (sum(times) for times in zip(*self.seconds.values()))
        return {
            "wall": round(wall, 2),
            "cpu": round(cpu, 2),
            "stages": self.seconds,
            "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "tokens": len(labels),
            "trained": pc.sum(pc.not_equal(labels, -100)).as_py(),
            "packed": len(packed),
        }


def measure_recipe(options: argparse.Namespace, folder: str | None = None) -> dict[str, Any]:
    """Rows of a file → packed rows; kept in a folder, and read from it if they are there."""
    from tunesmith import allocator

    allocator.tune()  # as the command line does
    from tunesmith.data.cache import Cache
    from tunesmith.data.pack import pack
    from tunesmith.data.prepare import encode_examples, normalized
    from tunesmith.data.report import Report
    from tunesmith.data.rows import Row
    from tunesmith.model.load import load_tokenizer

    tokenizer, report = load_tokenizer(options.tokenizer), Report()
    rows = [Row(value, "alpaca.json", line) for line, value in enumerate(alpaca_rows(options), 1)]
    cache = Cache(Path(folder)) if folder else None
    stages = Stages()
    examples = normalized(rows, report, format="alpaca")
    stages.ended("read")
    how = {"max_length": options.max_length, "too_long": "truncate"}
    tokens = encode_examples(examples, tokenizer, report, num_proc=options.num_proc, cache=cache, **how)
    stages.ended("encode")
    packed = pack(tokens, options.max_length)
    stages.ended("pack")
    return stages.figures(packed)


def measure_cached(options: argparse.Namespace) -> dict[str, Any]:
    """The second of two runs."""
    with tempfile.TemporaryDirectory() as folder:
        measure_recipe(options, folder)
        return measure_recipe(options, folder)


def dataset_of_turns(options: argparse.Namespace) -> Any:
    """The rows as prompt and completion turns: the form in which TRL masks prompts without a special template."""
    import datasets

    rows = alpaca_rows(options)
    prompts = ["\n".join(filter(None, (row["instruction"], row["input"]))) for row in rows]
    return datasets.Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": prompt}] for prompt in prompts],
            "completion": [[{"role": "assistant", "content": row["output"]}] for row in rows],
        }
    )


def measure_trainer(options: argparse.Namespace) -> dict[str, Any]:
    """A dataset of turns → packed rows, as tunesmith's trainer does."""
    from tunesmith.data.report import Report
    from tunesmith.model.load import load_tokenizer
    from tunesmith.train.datasets import prepared
    from tunesmith.train.reading import Preparation

    how = Preparation(load_tokenizer(options.tokenizer), options.max_length, packing=True, num_proc=options.num_proc)
    dataset, stages = dataset_of_turns(options), Stages()
    packed = prepared("train_dataset", dataset, how, Report())
    stages.ended("prepare")
    return stages.figures(packed)


def measure_trl(options: argparse.Namespace) -> dict[str, Any]:
    """A dataset of turns → packed rows, as TRL's trainer does; a model of no size stands for the real one."""
    import trl
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    dataset, stages = dataset_of_turns(options), Stages()

    class Timed(trl.SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            stages.last = stages.now()
            found = super()._prepare_dataset(*args, **kwargs)
            stages.ended("prepare")
            return found

    with tempfile.TemporaryDirectory() as folder:
        args = trl.SFTConfig(
            output_dir=folder,
            packing=True,
            max_length=options.max_length,
            dataset_num_proc=options.num_proc,
            use_cpu=True,
            bf16=False,
            report_to="none",
        )
        trainer = Timed(model, args, train_dataset=dataset, processing_class=tokenizer)
        return stages.figures(trainer.train_dataset)


MEASURES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "recipe": measure_recipe,
    "cached": measure_cached,
    "trainer": measure_trainer,
    "trl": measure_trl,
}

if __name__ == "__main__":
    main()
