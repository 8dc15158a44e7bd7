"""The figures of a training: of all its steps, also of those before it was cut short."""

from collections.abc import Mapping, Sequence
from typing import Any


def training_figures(trainer: Any, metrics: Mapping[str, float]) -> dict[str, float]:
    """What `train_results.json` says of a training that has ended; every process must call it.

    Loss and tokens are those of the whole run, which the model card is told as well. Times and speeds can only be
    those of this session; where it went on from a checkpoint, `train_resumed_at_step` says from which.

    Args:
        metrics: what `trainer.train` returned of this session.
    """
    history, here = trainer.state.log_history, trainer.steps_here
    before = trainer.state.global_step - here
    loss = whole_loss(history, before, metrics["train_loss"], here)
    for line in history[-1:]:  # of the end of training
        line["train_loss"] = loss
    tokens, tokens_here = trainer.count_tokens(), trainer.count_tokens_here()
    speed = round(tokens_here / max(metrics["train_runtime"], 1e-9), 3)
    found = {**metrics, "train_loss": loss, "train_tokens": tokens, "train_tokens_per_second": speed}
    found |= utilization(trainer, metrics["train_runtime"])
    return found | ({"train_resumed_at_step": before} if before else {})


def utilization(trainer: Any, seconds: float) -> dict[str, float]:
    """The operations a second that training needed on this process, beside those that its device was measured at."""
    peak = trainer.peak_flops
    if not peak or not trainer.flops_seen or seconds <= 0:
        return {}
    needed = trainer.flops_seen / seconds
    return {"train_mfu": round(needed / peak, 4), "train_flops_per_second": needed, "peak_flops_per_second": peak}


def whole_loss(log_history: Sequence[Mapping[str, Any]], before: int, loss: float, steps: int) -> float:
    """Mean loss of a run whose last `steps` steps had `loss`, and whose first `before` steps are in the log.

    Steps between a log line and the checkpoint after it are in no line; the mean is that of the others.

    >>> whole_loss([{"step": 2, "loss": 4.0}, {"step": 3, "loss": 1.0}, {"step": 4, "loss": 9.0}], 3, 2.0, 3)
    2.5
    """
    total, counted, last = loss * steps, steps, 0
    for line in log_history:
        if "loss" in line and line["step"] <= before:
            total += line["loss"] * (line["step"] - last)
            counted, last = counted + line["step"] - last, line["step"]
    return total / counted if counted else loss
