"""GuardedTrainer: stops where going on would do harm, and says where, why, and what to do.

after each step     a signal was noted: save, and end the process as it asks
before each update  loss or gradient is not finite: stop, or skip the step within a budget
each micro-batch    out of memory: the same step again in halves
all the time        nothing happens for too long: end, with the stacks on file
"""

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from tunesmith import signals
from tunesmith.errors import DataError, MemoryLimitError, NonFiniteError
from tunesmith.train.callbacks import make_unfailing
from tunesmith.train.checkpoint import CheckpointTrainer
from tunesmith.train.watchdog import Watchdog

logger = logging.getLogger(__name__)

EXPLODED = 10.0  # times the median of the losses before
EXPLODED_LOGS = 3
REMEMBERED_LOSSES = 50
SHOWN_ROWS = 8


class GuardedTrainer(CheckpointTrainer):
    """Guards around transformers' loop.

    Attributes:
        skipped_steps: steps of this run whose loss or gradient was not finite, and which changed nothing.
        rows_at_once: rows of a forward pass, once memory was too small for a whole micro-batch; `None` until then.
    """

    skipped_steps = 0
    rows_at_once: int | None = None
    has_own_loss = False
    _stop_with: int | None = None  # a signal
    _logged_before = 0  # the step of the last log line

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._watchdog: Watchdog | None = None
        self._tr_loss = torch.zeros((), device=self.args.device)  # transformers makes it when training begins
        self._evaluation_due = self._cut_evaluation = False
        self._step_batches: list[Any] = []
        self._done_here = 0  # micro-batches of this step that are done
        self._at_step_begin: dict[str, Any] = {}
        self._skipped_since_log = 0
        self.add_callback(StepGuard(self))
        for callback in self.callback_handler.callbacks:
            if type(callback).__module__.startswith("transformers.integrations"):
                make_unfailing(callback)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; a signal ends it after a step, with a checkpoint.

        Raises: KeyboardInterrupt and `signals.Terminated` after a signal; NonFiniteError, MemoryLimitError,
            CheckpointError; DataError where a process that reads rows is gone.
        """
        self.skipped_steps, self._skipped_since_log = 0, 0
        self._evaluation_due = self._cut_evaluation = False
        try:
            with signals.heeded(), signals.postponed(), self._watched():
                output = super().train(*args, **kwargs)
                if (number := signals.received()) is not None:  # it came after the last step
                    signals.heed(number)
                return output
        except RuntimeError as error:
            if "DataLoader worker" in str(error):  # torch raises it wherever the main thread happens to be
                raise DataError(dead_worker(error)) from error
            raise

    # ---- signals -------------------------------------------------------------------------------------------------

    def asked_to_stop(self) -> int | None:
        """The signal that this process, or any other, was sent; every process must ask."""
        number = signals.received() or 0
        if self.args.world_size > 1:
            found = torch.tensor([float(number)] * self.args.world_size, device=self.args.device)
            found = found * (torch.arange(self.args.world_size, device=self.args.device) == self.args.process_index)
            number = int(self.accelerator.reduce(found, "sum").max().item())
        return number or None

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Any, model: nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Log, evaluate and save; then stop where a signal asked for it."""
        self._beat()
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except (KeyboardInterrupt, signals.Terminated):
            if self._cut_evaluation and self._saves:
                self._save_checkpoint(model, trial)  # evaluation has changed nothing
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            raise
        self._beat()
        if self._stop_with is not None:
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            signals.heed(self._stop_with)

    @property
    def _saves(self) -> bool:
        return str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) != "no"

    def stop_after_saving(self, number: int, control: Any) -> None:
        """Let the loop save this step, and then stop; the next session makes up for an evaluation that was due."""
        self._stop_with = number
        self._evaluation_due = self._evaluation_due or control.should_evaluate
        control.should_evaluate = False
        control.should_save = self._saves

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers'; a signal is heeded in the middle of it."""
        alone_in_training = self.is_in_train and self.args.world_size == 1
        try:
            with signals.at_once() if alone_in_training else nullcontext():
                return super().evaluate(*args, **kwargs)
        except (KeyboardInterrupt, signals.Terminated):
            self._cut_evaluation = self._evaluation_due = alone_in_training
            raise

    # ---- nothing happens -----------------------------------------------------------------------------------------

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """With a watchdog, if `hang_timeout` asks for one."""
        if not self.args.hang_timeout:
            yield
            return
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        dog = Watchdog(self.args.hang_timeout, folder / f"stacks-{self.args.process_index}.txt", self.tell_of_hang)
        with dog.watching() as self._watchdog:
            yield
        self._watchdog = None

    def _beat(self) -> None:
        if self._watchdog is not None:
            self._watchdog.beat()

    def tell_of_hang(self, sentence: str) -> None:
        """Called from another thread before the process ends."""
        logger.error("%s", sentence)

    # ---- memory --------------------------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The micro-batches of the next step; should it have to be begun anew, what it changes is noted before."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        self._step_batches, self._done_here = batches, 0
        self._at_step_begin = self._step_state()
        return batches, count

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch, in parts where memory is too small for it at once."""
        self._beat()
        while True:
            try:
                loss = self._in_parts(model, inputs, num_items_in_batch)
                break
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(inputs, error)
            self._again(model, num_items_in_batch)
        self._done_here += 1
        return loss

    def _in_parts(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """The micro-batch, or its parts one after another; their losses add up to its own."""
        rows = rows_of(inputs)
        if self.rows_at_once is None or rows is None or len(rows) <= self.rows_at_once:
            return self._one_pass(model, inputs, num_items_in_batch)
        collate = self.callback_handler.train_dataloader.collate_fn
        parts = [rows[begin : begin + self.rows_at_once] for begin in range(0, len(rows), self.rows_at_once)]
        self.current_gradient_accumulation_steps *= len(parts)
        try:
            on_device = (self._prepare_inputs(collate(part)) for part in parts)
            losses = [self._one_pass(model, part, num_items_in_batch) for part in on_device]
        finally:
            self.current_gradient_accumulation_steps //= len(parts)
        return torch.stack(losses).sum()

    def _one_pass(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """Forward and backward of what fits; subclasses add what they need around it."""
        return super().training_step(model, inputs, num_items_in_batch)

    def _halve(self, inputs: dict[str, Any], error: Exception) -> None:
        """Take half as many rows at once from now on. Raises: MemoryLimitError where there is nothing to halve."""
        rows = rows_of(inputs)
        held = len(rows) if rows is not None else 0
        now = min(held, self.rows_at_once or held)
        if now <= 1 or self.args.world_size > 1 or self.has_own_loss:
            raise MemoryLimitError(self._too_small(rows, error)) from error
        self.rows_at_once = -(-now // 2)
        logger.warning(
            "step %d: out of memory with %d rows in a forward pass; from here on %d at once. A step trains on the "
            "same rows as before.",
            self.state.global_step + 1,
            now,
            self.rows_at_once,
        )

    def _too_small(self, rows: Any, error: Exception) -> str:
        longest = max((len(row["input_ids"]) for row in rows or () if "input_ids" in row), default=0)
        memory = getattr(self, "memory", None)
        needs = f" A step is estimated to take {memory.total / 1e9:.1f} GB." if memory is not None else ""
        which = f" of one row; the longest has {longest:,} tokens" if longest else ""
        why = "" if self.args.world_size == 1 else " Several processes are not split by themselves."
        return (
            f"step {self.state.global_step + 1}: out of memory in a forward pass{which}.{needs}{why} Lower "
            "max_length, per_device_train_batch_size or tokens_per_batch, set gradient_checkpointing: true, or train "
            f"with adapter: lora. ({str(error).splitlines()[0]})"
        )

    def _again(self, model: nn.Module, num_items_in_batch: Any) -> None:
        """Begin the step anew: part of a gradient may have been added when memory ran out."""
        model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._take_up(self._at_step_begin)
        for batch in self._step_batches[: self._done_here]:
            self._in_parts(model, batch, num_items_in_batch)

    def _step_state(self) -> dict[str, Any]:
        """What a step changes besides gradients, as it stands before."""
        on_gpu = self.args.device.type == "cuda"
        found = {"random": torch.get_rng_state(), "loss": self._tr_loss.clone()}
        return found | ({"cuda": torch.cuda.get_rng_state()} if on_gpu else {})

    def _take_up(self, state: dict[str, Any]) -> None:
        """Back to where the step began; the loss that has been added up stays the loop's."""
        torch.set_rng_state(state["random"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])

    # ---- numbers -------------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm, after a look at whether the update may be made with it."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self._finite(norm):
            self._not_finite(model, norm)
        return norm

    def _finite(self, norm: Any) -> bool:
        """Whether loss and gradient norm are numbers; in float16 a gradient may overflow, and the scaler skips it."""
        loss = self._tr_loss.detach()
        if self.args.fp16:
            return bool(torch.isfinite(loss))
        return bool(torch.isfinite(loss + torch.as_tensor(norm, device=loss.device)))

    def _not_finite(self, model: nn.Module, norm: Any) -> None:
        """Stop before the update, or leave the step out. Raises: NonFiniteError to stop."""
        step = self.state.global_step + 1
        before = self._at_step_begin["loss"]
        loss, rows = float(self._tr_loss - before), rows_said(self)
        said = f"step {step}: loss {loss:g}, gradient norm {float(norm):g}. {rows}"
        self.skipped_steps += 1
        if self.args.on_nonfinite == "stop" or self.skipped_steps > self.args.max_skipped_steps:
            spent = f" {self.args.max_skipped_steps} steps were skipped before (max_skipped_steps)." * (
                self.args.on_nonfinite != "stop"
            )
            raise NonFiniteError(
                f"{said}{spent} The weights are those after step {step - 1}, and nothing was saved since. Look at the "
                "rows, lower learning_rate, or set on_nonfinite: skip."
            )
        logger.warning("%s The step is skipped (on_nonfinite: skip).", said)
        for parameter in model.parameters():
            parameter.grad = None  # an optimizer leaves a weight without a gradient as it is, decay included
        self._tr_loss.copy_(before)
        self._skipped_since_log += 1
        self._forget_step()

    def _forget_step(self) -> None:
        """Take the skipped step out of what is logged; subclasses that sum more override it."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The mean loss is that of the steps that counted."""
        if self.is_in_train and "loss" in logs and self._skipped_since_log:
            steps = self._steps_to_log
            counted = steps - self._skipped_since_log
            logs["skipped_steps"] = self._skipped_since_log
            self._skipped_since_log = 0
            if counted > 0:
                logs["loss"] *= steps / counted
            else:
                del logs["loss"]
        super().log(logs, start_time)

    @property
    def _steps_to_log(self) -> int:
        return max(1, self.state.global_step - self._logged_before)

    # ---- what a checkpoint keeps of it ------------------------------------------------------------------------------

    def _counters(self) -> dict[str, Any]:
        more = {"skipped_steps": self.skipped_steps, "skipped_since_log": self._skipped_since_log}
        return super()._counters() | more | {"rows_at_once": self.rows_at_once, "evaluation_due": self._evaluation_due}

    def _restore_counters(self, saved: dict[str, Any]) -> None:
        super()._restore_counters(saved)
        self.skipped_steps, self._skipped_since_log = saved["skipped_steps"], saved["skipped_since_log"]
        self.rows_at_once, self._evaluation_due = saved["rows_at_once"], False
        self._logged_before = saved["last_logged"]
        if saved["evaluation_due"] and self.eval_dataset is not None:
            self._determine_best_metric(self._evaluate(None, None), None)


class StepGuard(TrainerCallback):
    """Looks for signals after each step, and for losses that explode whenever one is logged."""

    def __init__(self, trainer: GuardedTrainer):
        self.trainer = trainer
        self.losses: deque[float] = deque(maxlen=REMEMBERED_LOSSES)
        self.high = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self.trainer._stop_with, self.trainer._logged_before = None, state.global_step
        self.losses.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        number = self.trainer.asked_to_stop()
        if number is not None:
            self.trainer.stop_after_saving(number, control)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        self.trainer._beat()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: D102
        loss = (logs or {}).get("loss")
        self.trainer._logged_before = state.global_step
        if loss is None or not state.is_world_process_zero:
            return
        usual = median(self.losses) if len(self.losses) >= EXPLODED_LOGS else None
        self.high = self.high + 1 if usual is not None and loss > EXPLODED * usual else 0
        if self.high == EXPLODED_LOGS:
            logger.warning(
                "step %d: the loss has been over %g times its median (%.3g) for %d log lines, now %.3g. The run goes "
                "on; a lower learning_rate or max_grad_norm may be wanted.",
                state.global_step, EXPLODED, usual, EXPLODED_LOGS, loss,
            )  # fmt: skip
        if not self.high:
            self.losses.append(loss)


def rows_of(inputs: Any) -> Any:
    """The rows that one of our collators made a batch of, `None` for a batch of another."""
    held = inputs.get("rows") if hasattr(inputs, "get") else None
    return None if held is None else held.rows


def rows_of_step(trainer: Any) -> list[int] | None:
    """Numbers of the rows of the step under way, drawn once more from its sampler; `None` for a stream."""
    loader = trainer.callback_handler.train_dataloader
    batches = getattr(loader, "batch_sampler", None)
    if batches is None or not hasattr(loader.dataset, "__len__"):
        return None
    size = trainer.args.gradient_accumulation_steps
    first = trainer.state.global_step % -(-len(batches) // size) * size
    return [number for batch in islice(batches, first, first + size) for number in batch]


def rows_said(trainer: Any) -> str:
    """Which rows the step under way is made of."""
    numbers = rows_of_step(trainer)
    if numbers is None:
        return "The rows of a stream have no numbers."
    shown = ", ".join(str(number) for number in numbers[:SHOWN_ROWS])
    more = f" and {len(numbers) - SHOWN_ROWS} more" if len(numbers) > SHOWN_ROWS else ""
    return f"Its rows are {shown}{more} of train_dataset, counted from 0."


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a GPU or on a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def dead_worker(error: RuntimeError) -> str:
    """The sentence for a process of the DataLoader that is gone."""
    return (
        f"a process that reads rows is gone: {str(error).splitlines()[0]} Most often the system killed it for its "
        "memory. Set dataloader_num_workers: 0, or a smaller number."
    )
