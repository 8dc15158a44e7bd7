"""Callbacks that do something at a step."""

import os
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class ArmAtStep(TrainerCallback):
    """Lets a `Killer` count from the end of a step on, for one step."""

    def __init__(self, killer: Any, step: int):
        self.killer, self.step = killer, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.killer.armed = state.global_step == self.step


class AtStep(TrainerCallback):
    """Calls a function at the end of a step."""

    def __init__(self, step: int, function: Callable[[], Any]):
        self.step, self.function = step, function

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.function()


class SignalInStep(TrainerCallback):
    """Sends this process a signal in the middle of a step, between its micro-batches."""

    def __init__(self, step: int, number: int, times: int = 1):
        self.step, self.number, self.times = step, number, times

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
