"""What a person watches while the trainer trains: files of the run, progress on the terminal, sampled answers."""

# ruff: noqa: D102 -- TrainerCallback describes its hooks

import atexit
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunesmith.deliver.summary import clock_text, share_text
from tunesmith.evaluate.generate import generate_texts
from tunesmith.evaluate.questions import ask
from tunesmith.runs import SAMPLES_FILE, TRAINER_LOG_FILE, Run, append_line, write_text

logger = logging.getLogger(__name__)

STATUS_SECONDS = 1.0  # status.json is synced to disk: not more often than a page reads it


class Work(NamedTuple):
    """Arithmetic, to say how much of what a device can do is put to use."""

    flops_seen: Callable[[], float]
    """Floating-point operations that the training so far needed, on this process."""
    peak: float
    """Those that its device does in a second, as measured."""


class Pace:
    """Speed and remaining time from what has been measured, without the first step.

    The first step pays for compilation, caches and memory that later steps find ready, so it is counted in nothing.
    Evaluation and saving count in the remaining time but not in the training speed.
    """

    def __init__(
        self,
        tokens_seen: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
        work: Work | None = None,
    ) -> None:
        self.tokens_seen = tokens_seen
        self.clock = clock
        self.work = work
        self.start(step=0)

    def start(self, step: int) -> None:
        """Begin to measure; a resumed run begins at its step."""
        self.started = self.mark = self.clock()
        self.step = step
        self.first_step: int | None = None  # the step after which measuring begins
        self.first_step_ended = self.started
        self.tokens_then = self.tokens_now = 0
        self.flops_then = self.flops_now = 0.0
        self.step_seconds = 0.0

    def end_step(self, step: int) -> None:
        """Call when an optimizer step is done."""
        now = self.clock()
        self.tokens_now = int(self.tokens_seen()) if self.tokens_seen else 0
        self.flops_now = self.work.flops_seen() if self.work else 0.0
        if self.first_step is None:
            self.first_step, self.first_step_ended = step, now
            self.tokens_then, self.flops_then = self.tokens_now, self.flops_now
        else:
            self.step_seconds += now - self.mark
        self.step, self.mark = step, now

    def skip(self) -> None:
        """Call after anything that is not training: the time until now belongs to no step."""
        self.mark = self.clock()

    @property
    def elapsed(self) -> float:
        """Seconds since training began."""
        return self.clock() - self.started

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens per second of training, or None before the second step has ended."""
        tokens = self.tokens_now - self.tokens_then
        return tokens / self.step_seconds if tokens > 0 and self.step_seconds > 0 else None

    @property
    def mfu(self) -> float | None:
        """Share of the device's measured peak that training needed (model FLOPs utilization), or None as above."""
        if self.work is None or self.step_seconds <= 0 or self.flops_now <= self.flops_then:
            return None
        return (self.flops_now - self.flops_then) / self.step_seconds / self.work.peak

    def remaining(self, total_steps: int) -> float | None:
        """Seconds to the last step at the pace so far, or None while there is nothing to go by."""
        if self.step >= total_steps:
            return 0.0
        if self.first_step is None or self.step <= self.first_step:
            return None
        seconds_per_step = (self.clock() - self.first_step_ended) / (self.step - self.first_step)
        return seconds_per_step * (total_steps - self.step)


class RunLogCallback(TrainerCallback):
    """Writes metrics.jsonl, trainer_log.jsonl and status.json into the run directory as training goes.

    The state stays `running` when training ends: whoever started the run says when it is completed.

    Args:
        run: the run that is written to, by the first process only.
        tokens_seen: real tokens (no padding) trained so far; None leaves the speed out.
        work: arithmetic so far and the device's peak; None leaves the utilization out.
    """

    def __init__(self, run: Run, tokens_seen: Callable[[], int] | None = None, work: Work | None = None) -> None:
        self.run = run
        self.pace = Pace(tokens_seen, work=work)
        self.figures: dict[str, Any] = {}
        self.status_written = -math.inf
        self.failed = False
        self.aborted = False
        """Set it, from another thread too, and training stops after the step that is under way."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pace.start(state.global_step)
        self.figures = {}
        if state.is_world_process_zero:
            forget_steps_after(state.global_step, self.run.path / TRAINER_LOG_FILE)
            self._write_status(state, force=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pace.end_step(state.global_step)
        control.should_training_stop = control.should_training_stop or self.aborted
        if state.is_world_process_zero:
            self._write_status(state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pace.skip()

    on_save = on_evaluate

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        self.figures |= {key: logs[key] for key in ("loss", "eval_loss") if key in logs}
        with self._told_once():
            self.run.log_metrics({"step": state.global_step} | logs)
            append_line(self.run.path / TRAINER_LOG_FILE, self._trainer_log_line(state, logs))
        self._write_status(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._write_status(state, force=True)

    def _trainer_log_line(self, state: TrainerState, logs: Mapping[str, Any]) -> dict[str, Any]:
        remaining = self.pace.remaining(state.max_steps)
        line = {
            "current_steps": state.global_step,
            "total_steps": state.max_steps,
            "loss": logs.get("loss"),
            "eval_loss": logs.get("eval_loss"),
            "predict_loss": logs.get("predict_loss"),
            "reward": logs.get("reward"),
            "learning_rate": logs.get("learning_rate"),
            "epoch": logs.get("epoch"),
            "percentage": round(100 * state.global_step / state.max_steps, 2) if state.max_steps > 0 else None,
            "elapsed_time": clock_text(self.pace.elapsed, hours=True),
            "remaining_time": None if remaining is None else clock_text(remaining, hours=True),
        }
        return {key: value for key, value in line.items() if value is not None}

    def _write_status(self, state: TrainerState, force: bool = False) -> None:
        now = self.pace.clock()
        self.run.note(
            step=state.global_step,
            total_steps=state.max_steps,
            **self.figures,
            tokens_per_second=_rounded(self.pace.tokens_per_second),
            mfu=_rounded(self.pace.mfu, 4),
            eta_seconds=_rounded(self.pace.remaining(state.max_steps)),
        )
        if force or now - self.status_written >= STATUS_SECONDS:
            self.status_written = now
            with self._told_once():
                self.run.write_status("running")

    @contextmanager
    def _told_once(self) -> Iterator[None]:
        """A log that cannot be written, as on a full disk, is said once and costs no training."""
        try:
            yield
        except OSError as error:
            if not self.failed:
                logger.warning("the run's log cannot be written (%s); training goes on", error)
            self.failed = True


def make_unfailing(callback: TrainerCallback) -> None:
    """Let what a tracker raises, such as a server that is away, be a warning: it must not end a training."""
    for name in (name for name in dir(TrainerCallback) if name.startswith("on_")):
        setattr(callback, name, _unfailing(callback, getattr(callback, name)))


def _unfailing(callback: TrainerCallback, hook: Callable) -> Callable:
    @wraps(hook)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return hook(*args, **kwargs)
        except Exception as error:  # whatever a tracker may raise
            if not getattr(callback, "has_failed", False):
                what = f"{type(error).__name__}: {error}"
                logger.warning("%s failed (%s); training goes on", type(callback).__name__, what)
            callback.has_failed = True
            return None

    return call


class SampleCallback(TrainerCallback):
    """Answers a few held-out prompts at every evaluation, into `samples.jsonl`: step, prompt, label, predict.

    Args:
        run: the run that is written to.
        examples: held-out examples with messages or prompt and completion.
        tokenizer: read, not changed.
        decoding: how answers are generated.
        ask_options: further arguments of `evaluate.questions.ask`.
    """

    def __init__(
        self, run: Run, examples: Sequence[Mapping[str, Any]], tokenizer: Any, decoding: Any, **ask_options: Any
    ) -> None:
        self.run, self.tokenizer, self.decoding = run, tokenizer, decoding
        questions = (ask(example, tokenizer, index=index, **ask_options) for index, example in enumerate(examples))
        self.questions = list(questions)
        self.answered: int | None = None  # the step of the last answers

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            path = self.run.path / SAMPLES_FILE
            forget_steps_after(state.global_step, path, "step")
            self.answered = int(step_of(path.read_bytes().splitlines()[-1], "step")) if path.is_file() else None

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or self.answered == state.global_step:  # the last step is evaluated twice
            return
        self.answered = state.global_step
        prompts = [question.prompt.input_ids for question in self.questions]
        how = {"decoding": self.decoding, "seed": args.seed}
        answers = dict(generate_texts(kwargs["model"], self.tokenizer, prompts, **how))
        for index, question in enumerate(self.questions):
            row = {"step": state.global_step, "prompt": question.asked, "label": question.label}
            append_line(self.run.path / SAMPLES_FILE, {**row, "predict": answers[index]})


class ProgressCallback(TrainerCallback):
    """Progress for a person: one bar on a terminal, and anywhere else plain lines that get rarer as time goes on.

    It takes the place of transformers' `ProgressCallback` and `PrinterCallback` (see `use_progress`). The caller who
    catches an exception of `train()` calls `close()`, which gives the terminal its cursor back.

    Args:
        tokens_seen: real tokens (no padding) trained so far; None leaves the speed out.
        console: where to write; None is standard output.
        seconds_between_lines: plain lines come no faster than this; the first, the last and evaluations always do.
        work: arithmetic so far and the device's peak; None leaves the utilization out.
    """

    def __init__(
        self,
        tokens_seen: Callable[[], int] | None = None,
        console: Console | None = None,
        seconds_between_lines: float = 5.0,
        work: Work | None = None,
    ) -> None:
        self.console = console or Console()
        self.pace = Pace(tokens_seen, work=work)
        self.seconds_between_lines = seconds_between_lines
        self.line_printed = -math.inf
        self.logs: dict[str, Any] = {}
        self.evaluated_batches = 0
        self.bar: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pace.start(state.global_step)
        self.logs, self.line_printed = {}, -math.inf
        if state.is_world_process_zero and self.console.is_interactive and not args.disable_tqdm:
            self._open_bar(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pace.end_step(state.global_step)
        if self.bar:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.evaluated_batches += 1

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.evaluated_batches = 0
        self.pace.skip()

    on_save = on_predict = on_evaluate

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self.logs |= logs
        is_evaluation = "eval_loss" in logs
        if is_evaluation or ("loss" in logs and not self.bar and self._is_due(state)):
            line = progress_line(state.global_step, state.max_steps, logs, self.pace)
            self.console.out(line, highlight=False)  # `out` does not wrap: one log is one line

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it stands and give the terminal back; may be called twice."""
        if self.bar:
            self.bar.stop()
            self.bar = None
            atexit.unregister(self.close)

    def _open_bar(self, state: TrainerState) -> None:
        columns: list[ProgressColumn] = [_FiguresColumn(self)]
        if self.console.width >= 72:
            columns.insert(0, BarColumn(bar_width=max(10, min(40, self.console.width - 62))))
        self.bar = Progress(*columns, console=self.console, refresh_per_second=4)
        self.bar.add_task("train", total=state.max_steps, completed=state.global_step)
        atexit.register(self.close)  # an exception that nobody catches must not leave the cursor hidden
        self.bar.start()

    def _is_due(self, state: TrainerState) -> bool:
        """True for the first and the last step, and when enough time has passed: 5 s, later 1 % of the run so far."""
        now = self.pace.clock()
        wait = max(self.seconds_between_lines, self.pace.elapsed / 100)
        if now - self.line_printed < wait and state.global_step < state.max_steps:
            return False
        self.line_printed = now
        return True


class _FiguresColumn(ProgressColumn):
    """`12/90 · loss 0.834 · 412 tokens/s · 0:07 gone · 0:35 left`, as much of it as fits."""

    max_refresh = None

    def __init__(self, callback: ProgressCallback) -> None:
        super().__init__()
        self.callback = callback

    def render(self, task: Task) -> Text:
        pace, loss, batches = self.callback.pace, self.callback.logs.get("loss"), self.callback.evaluated_batches
        step, total = int(task.completed), int(task.total or 0)
        speed, left = pace.tokens_per_second, pace.remaining(total)
        parts = [  # (what to give up first, text)
            (9, f"{step}/{total}"),
            (8, f"loss {loss:.3f}" if isinstance(loss, float) else ""),
            (6, f"evaluating, batch {batches}" if batches else f"{speed:,.0f} tokens/s" if speed else ""),
            (4, f"MFU {share_text(pace.mfu)}" if pace.mfu and not batches else ""),
            (5, f"{clock_text(pace.elapsed)} gone"),
            (7, f"{clock_text(left)} left" if left is not None and step < total else ""),
        ]
        parts = [part for part in parts if part[1]]
        room = self.callback.console.width if self.callback.console.width < 72 else 58
        while len(" · ".join(text for _, text in parts)) > room - 1 and len(parts) > 1:
            parts.remove(min(parts))
        return Text(" · ".join(text for _, text in parts), no_wrap=True, overflow="ellipsis")


def use_progress(trainer: Any, callback: ProgressCallback | None) -> None:
    """Put `callback`, or nothing, in the place of the progress callbacks that transformers gave the trainer."""
    from transformers.trainer_callback import PrinterCallback
    from transformers.trainer_callback import ProgressCallback as TransformersProgressCallback

    trainer.remove_callback(TransformersProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if callback is not None:
        trainer.add_callback(callback)


def progress_line(step: int, total_steps: int, logs: Mapping[str, Any], pace: Pace) -> str:
    """One plain line, e.g. `step 12/90 · loss 0.834 · grad norm 1.20 · lr 9.1e-04 · 412 tokens/s · 0:35 left`."""
    parts = [f"step {step}/{total_steps}"] if total_steps else []  # nothing is trained
    for key, label, form in (
        ("loss", "loss", ".3f"),
        ("eval_loss", "eval loss", ".3f"),
        ("grad_norm", "grad norm", ".2f"),
        ("learning_rate", "lr", ".1e"),
    ):
        if logs.get(key) is not None:
            parts.append(f"{label} {float(logs[key]):{form}}")
    if "loss" in logs and pace.tokens_per_second:
        parts.append(f"{pace.tokens_per_second:,.0f} tokens/s")
        parts += [f"MFU {share_text(pace.mfu)}"] if pace.mfu else []
    remaining = pace.remaining(total_steps)
    if remaining and step < total_steps:
        parts.append(f"{clock_text(remaining)} left")
    return " · ".join(parts)


def forget_steps_after(step: int, path: Path, key: str = "current_steps") -> None:
    """Leave the lines of a log up to the step that training begins from; without any the file goes.

    Args:
        key: what lines call their step. Those that a crash cut short go, too.
    """
    lines = path.read_bytes().splitlines(keepends=True) if step and path.is_file() else []
    kept = [line for line in lines if step_of(line, key) <= step]
    if kept:
        write_text(path, b"".join(kept).decode())
    else:
        path.unlink(missing_ok=True)


def step_of(line: bytes, key: str) -> float:
    """The step of a line of a log; infinite for a line that a crash cut short."""
    try:
        return float(json.loads(line)[key])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _rounded(value: float | None, digits: int = 1) -> float | None:
    return None if value is None else round(value, digits)
