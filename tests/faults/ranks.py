"""What `test_ranks` runs on two processes: `torchrun ... -m tests.faults.ranks FOLDER exact|signal|kill`."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tests.faults.runs import make_run, outcome, train
from tests.faults.steps import AtStep, SignalInStep

DROPS = {"model": {"attention_dropout": 0.1}, "save_total_limit": None}
RESUMED = (1, 2, 3)


def exact(folder: Path, rank: int) -> Any:
    """Outcomes of a run, and of its rest from three of its steps."""
    found = {"whole": train(folder / "whole", **DROPS)}
    for step in RESUMED:
        torch.distributed.barrier()
        checkpoint = str(folder / "whole" / f"checkpoint-{step}")
        found[str(step)] = train(folder / f"again-{step}", checkpoint, **DROPS)
    return found


def signalled(folder: Path, rank: int) -> Any:
    """The code that each process ends with where only the second was sent a signal."""
    callbacks = [SignalInStep(1, signal.SIGTERM)] if rank == 1 else []
    trainer = make_run(folder / "run", **{**DROPS, "save_steps": 100}, callbacks=callbacks)
    try:
        trainer.train()
    except SystemExit as stop:
        return {"code": stop.code, "step": trainer.state.global_step}
    return outcome(trainer)


def killed(folder: Path, rank: int) -> Any:
    """The second process dies in the middle of training."""
    callbacks = [AtStep(2, lambda: os.kill(os.getpid(), signal.SIGKILL))] if rank == 1 else []
    return train(folder / "run", callbacks=callbacks, **DROPS)


TASKS = {"exact": exact, "signal": signalled, "kill": killed}


def main(folder: Path, task: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    (folder / f"{task}{rank}.json").write_text(json.dumps(TASKS[task](folder / task, rank)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
