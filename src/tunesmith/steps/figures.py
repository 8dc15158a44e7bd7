"""The figures of a training: of all its steps, also of those before it was cut short."""

from collections.abc import Mapping
from typing import Any


def training_figures(trainer: Any, metrics: Mapping[str, float]) -> dict[str, float]:
    """What `train_results.json` says of a training that has ended; every process must call it.

    Loss and tokens are those of the whole run. Times and speeds can only be those of this session; where it went on
    from a checkpoint, `train_resumed_at_step` says from which.

    Args:
        metrics: what `trainer.train` returned.
    """
    before = trainer.state.global_step - trainer.steps_here
    tokens, tokens_here = trainer.count_tokens(), trainer.count_tokens_here()
    speed = round(tokens_here / max(metrics["train_runtime"], 1e-9), 3)
    found = {**metrics, "train_tokens": tokens, "train_tokens_per_second": speed}
    found |= utilization(trainer, metrics["train_runtime"])
    return found | ({"train_resumed_at_step": before} if before else {})


def utilization(trainer: Any, seconds: float) -> dict[str, float]:
    """The operations a second that training needed on this process, beside those that its device was measured at."""
    peak = trainer.peak_flops
    if not peak or not trainer.flops_seen or seconds <= 0:
        return {}
    needed = trainer.flops_seen / seconds
    return {"train_mfu": round(needed / peak, 4), "train_flops_per_second": needed, "peak_flops_per_second": peak}
