"""Seconds from the command `tunesmith train` to the end of its first step, on 1,000 rows, files cached.

    python -m benchmarks.start MODEL_FOLDER alpaca_en_demo.json --rounds 5

The run is stopped after the step. `stages` are the seconds after the command at which, by the run's files:

    recipe        the recipe was read and the libraries imported
    data          rows were tokenized
    trainer       model and trainer were there
    training      the first step began
    first step    it had ended

Beside it `libraries`: what importing torch, transformers' trainer and model, datasets, peft and accelerate takes in a
bare Python, and `hello`, the bare Python. Nothing else may run on the machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.pairs import in_turn, parser_of, save, spread

NAME = "start"
ROWS = 1000
LIBRARIES = """
import torch, datasets, peft, accelerate
from transformers import Seq2SeqTrainer, AutoTokenizer, LlamaForCausalLM
"""
SIDES = ("train", "libraries", "hello")


def main() -> None:
    """Run the sides in turn, print, save."""
    parser = parser_of(NAME, __doc__)
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("data", type=Path, help="JSON list of Alpaca rows, repeated to 1,000")
    parser.add_argument("--alone", choices=SIDES, help="run the one side here and print its figures only")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps({"stages": MEASURES[options.alone](options)}))
        return
    words = ["benchmarks.start", options.model, str(options.data), "--alone"]
    in_turn({"train": [*words, "train"]}, 1)  # files are cached now
    rounds = in_turn({side: [*words, side] for side in SIDES}, options.rounds)
    stages = {side: stages_of([one[side]["stages"] for one in rounds]) for side in SIDES}
    save(options.output, NAME, rounds, rows=ROWS, sides=stages)
    for side, found in stages.items():
        for stage, (middle, ends) in found.items():
            print(f"{side:12}{stage:12}{middle:>8.2f} s  {ends[0]}–{ends[1]}")


def stages_of(runs: Sequence[dict[str, float]]) -> dict[str, tuple[float, list[float]]]:
    """Median and spread of each stage."""
    return {stage: spread([run[stage] for run in runs], 2) for stage in runs[0]}


def measure_train(options: argparse.Namespace) -> dict[str, float]:
    """Run the command until its first step has ended."""
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "rows.json", Path(folder) / "run"
        rows = json.loads(options.data.read_text(encoding="utf-8"))
        data.write_text(json.dumps([rows[index % len(rows)] for index in range(ROWS)]), encoding="utf-8")
        flags = {"model_name_or_path": options.model, "dataset": data, "output_dir": run, "logging_steps": 1}
        flags |= {"eval_strategy": "no", "save_strategy": "no", "use_cpu": True}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "tunesmith", "train", *words]
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            return {stage: moment - begin for stage, moment in moments(process, run).items()}
        finally:
            process.kill()
            process.communicate()


def moments(process: subprocess.Popen, run: Path) -> dict[str, float]:
    """When each stage had ended, from the first to that of the first step."""
    found: dict[str, float] = {}
    while len(found) < len(SIGNS):
        for stage, has_ended in SIGNS.items():
            if stage not in found and has_ended(run):
                found[stage] = time.perf_counter()
        if process.poll() is not None:
            raise SystemExit(f"tunesmith train failed:\n{process.stderr.read().decode()[-4000:]}")
        time.sleep(0.02)
    return found


def is_running(run: Path) -> bool:
    """Whether the status says that training goes on."""
    status = run / "status.json"
    return status.exists() and json.loads(status.read_text(encoding="utf-8"))["state"] == "running"


SIGNS: dict[str, Callable[[Path], bool]] = {
    "recipe": lambda run: (run / "recipe.yaml").exists(),
    "data": lambda run: (run / "data_report.json").exists(),
    "trainer": lambda run: (run / "training_args.json").exists(),
    "training": is_running,
    "first step": lambda run: (run / "trainer_log.jsonl").exists(),
}
"""How the run's files tell that a stage has ended."""


def measure_python(code: str) -> dict[str, float]:
    """A Python that runs this."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stderr=subprocess.DEVNULL)
    return {"ended": time.perf_counter() - begin}


MEASURES = {
    "train": measure_train,
    "libraries": lambda options: measure_python(LIBRARIES),
    "hello": lambda options: measure_python(""),
}

if __name__ == "__main__":
    main()
