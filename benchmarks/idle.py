"""What our trainer adds to a step around forward, backward and optimizer: SmolLM2-135M, Alpaca rows, as a run does it.

    python -m benchmarks.idle MODEL_FOLDER alpaca_en_demo.json --rounds 5

A step lasts from the end of the step before to its own: batches, callbacks, the run's files, progress, logging every
step. `work` is the time inside the model's forward pass (loss included), backward, gradient clipping, the optimizer
and zeroing of gradients; `idle` is the rest, and `share` its part of the step. `pieces` are milliseconds a step of
what idle is made of; one inside another is counted in both. Nothing else may run on the machine.
"""

import argparse
import io
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.pairs import in_turn, parser_of, save, spread, token_rows
from benchmarks.training import RATES, adapter, add_steps, check_steps
from tunesmith import allocator

NAME = "idle"


def main() -> None:
    """Run the rounds, print, save."""
    parser = parser_of(NAME, __doc__)
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("data", type=Path, help="JSON list of Alpaca rows")
    parser.add_argument("--modes", nargs="+", choices=sorted(RATES), default=sorted(RATES))
    parser.add_argument("--alone", choices=sorted(RATES), help="run the one mode here and print its figures only")
    add_steps(parser, steps=8, untimed=2)
    options = parser.parse_args()
    check_steps(parser, options)
    if options.alone:
        allocator.tune()  # as the command line does, before torch is imported
        print(json.dumps(measured(options.model, token_rows(options.model, options.data), options)))
        return
    how = [f"--steps={options.steps}", f"--untimed={options.untimed}"]
    words = ["benchmarks.idle", options.model, str(options.data), *how, "--alone"]
    rounds = in_turn({mode: [*words, mode] for mode in options.modes}, options.rounds)
    found = {mode: summary([one[mode] for one in rounds]) for mode in options.modes}
    save(options.output, NAME, rounds, steps=options.steps, modes=found)
    for mode, figures in found.items():
        print(f"{mode:6}" + "  ".join(f"{name} {middle:.4f} ({ends})" for name, (middle, ends) in figures.items()))


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and spreads."""
    return {name: spread([run[name] for run in runs], 5) for name in ("step", "work", "idle", "share")}


def measured(model: str, rows: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step and its parts, means over the timed steps, with the callbacks of `tunesmith train`."""
    from rich.console import Console

    from tunesmith import SFTConfig, SFTTrainer
    from tunesmith.runs import Run
    from tunesmith.train.callbacks import ProgressCallback, RunLogCallback, use_progress

    options.mode = options.alone
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder, max_steps=options.steps, logging_steps=1, learning_rate=RATES[options.mode],
            save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=False,
        )  # fmt: skip
        trainer = SFTTrainer(model, args, train_dataset=rows, peft_config=adapter(options))
        use_progress(trainer, ProgressCallback(lambda: trainer.tokens_seen, Console(file=io.StringIO())))
        trainer.add_callback(RunLogCallback(Run(folder), lambda: trainer.tokens_seen))
        clock = Clock(options.untimed)
        watch(trainer, clock)
        trainer.train()
    return clock.figures()


class Clock:
    """Seconds by name, of the steps after the first few."""

    def __init__(self, untimed: int):
        self.untimed, self.steps = untimed, 0
        self.seconds: dict[str, float] = defaultdict(float)
        self.begin = self.end = 0.0

    def step_ended(self) -> None:
        """The first few are forgotten."""
        self.steps, self.end = self.steps + 1, time.perf_counter()
        if self.steps == self.untimed:
            self.begin = self.end
            self.seconds.clear()

    def timed(self, owner: Any, method: str, name: str) -> None:
        """Count the time inside a method of this object."""
        call = getattr(owner, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - begin

        setattr(owner, method, counted)

    def figures(self) -> dict[str, Any]:
        """Seconds a step; idle is what is not work."""
        steps = self.steps - self.untimed
        each = {name: seconds / steps for name, seconds in self.seconds.items()}
        step, work = (self.end - self.begin) / steps, sum(each[name] for name in WORK)
        pieces = {name: round(1000 * seconds, 3) for name, seconds in each.items()}
        return {"step": step, "work": work, "idle": step - work, "share": (step - work) / step, "pieces": pieces}


WORK = ("forward", "backward", "clip", "optimizer", "zero_grad")


def watch(trainer: Any, clock: Clock) -> None:
    """Have the clock count what the trainer calls."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        """Wraps what is there only when training begins, and tells the clock of steps; the last of the callbacks."""

        def on_train_begin(self, args, state, control, **kwargs):
            """The model and the optimizer."""
            model = kwargs["model"]
            model.register_forward_pre_hook(lambda *_: setattr(self, "begin", time.perf_counter()))
            model.register_forward_hook(lambda *_: self.ended("forward"))
            optimizer = kwargs["optimizer"].optimizer  # in accelerate's wrapper
            optimizer.register_step_pre_hook(lambda *_: setattr(self, "begin", time.perf_counter()))
            optimizer.register_step_post_hook(lambda *_: self.ended("optimizer"))
            clock.timed(model, "zero_grad", "zero_grad")

        def ended(self, name):
            """Count what a hook has seen begin."""
            clock.seconds[name] += time.perf_counter() - self.begin

        def on_step_end(self, args, state, control, **kwargs):
            """Count it."""
            clock.step_ended()

    trainer.add_callback(Watch())
    clock.timed(trainer.accelerator, "backward", "backward")
    clock.timed(trainer.accelerator, "clip_grad_norm_", "clip")
    clock.timed(trainer, "get_batch_samples", "batches")
    clock.timed(trainer, "training_step", "training_step")
    clock.timed(trainer, "log", "log")
    for event in ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log"):
        clock.timed(trainer.callback_handler, event, event)


if __name__ == "__main__":
    main()
