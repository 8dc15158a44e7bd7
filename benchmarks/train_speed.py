"""Tokens per second of tunesmith's training on a JSON file of Alpaca rows, one JSON line of figures.

    python -m benchmarks.train_speed MODEL_FOLDER alpaca.json --mode full --steps 6

The first step pays for caches and memory and is left out. Compare figures only with ones taken in turn on the same
machine: clocks drift by a factor of two. `--precision float32` leaves the choice of precision out of the comparison.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from tunesmith import allocator

allocator.tune()  # as the command line does, before torch is imported

from transformers import TrainerCallback  # noqa: E402

from tunesmith.config import DataConfig, ModelFields  # noqa: E402
from tunesmith.data.collect import collect  # noqa: E402
from tunesmith.data.prepare import encode_examples  # noqa: E402
from tunesmith.data.report import Report  # noqa: E402
from tunesmith.model.adapt import adapt  # noqa: E402
from tunesmith.model.load import load_model, load_tokenizer  # noqa: E402
from tunesmith.train.sft import SFTConfig, SFTTrainer  # noqa: E402


class StepClock(TrainerCallback):
    """Seconds of each step and tokens so far."""

    def __init__(self, trainer: SFTTrainer):
        self.trainer, self.seconds, self.tokens = trainer, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Note the step."""
        self.seconds.append(time.perf_counter() - self.begin)
        self.tokens.append(self.trainer.tokens_seen)


def main() -> None:
    """Train some steps and print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--mode", choices=["full", "lora"], default="full")
    parser.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8, help="rows per step")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.model)
    examples = collect(DataConfig(dataset=str(options.data), max_samples=400)).train
    rows = encode_examples(examples, tokenizer, Report(), max_length=1024)
    model = adapt(load_model(options.model, dtype="float32"), ModelFields(adapter=options.mode))
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.rows,
            learning_rate=1e-4 if options.mode == "lora" else 2e-5,
            bf16={"auto": None, "float32": False, "bfloat16": True}[options.precision],
            use_cpu=True,
            save_strategy="no",
            seed=0,
            disable_tqdm=True,
        )
        trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
        clock = StepClock(trainer)
        trainer.add_callback(clock)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    figures = {
        "side": "tunesmith",
        "mode": options.mode,
        "precision": "bfloat16" if trainer.args.bf16 else "float32",
        "tokens_per_second": (clock.tokens[-1] - clock.tokens[0]) / sum(clock.seconds[1:]),
        "seconds_per_step": clock.seconds,
        "tokens": clock.tokens,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "loss": [entry["loss"] for entry in logs],
        "grad_norm": [entry["grad_norm"] for entry in logs],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
