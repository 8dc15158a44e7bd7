"""OwnAccelerator: a trainer goes on although the options of another one were made since."""

from typing import Any

from accelerate.state import AcceleratorState
from transformers import Seq2SeqTrainer


class OwnAccelerator(Seq2SeqTrainer):
    """Keeps what accelerate knows of the processes.

    All accelerators of a program share one state, and making a `TrainingArguments` empties it: transformers' trainer,
    asked to train afterwards, misses an attribute.
    """

    @property
    def accelerator(self) -> Any:
        """What transformers made, with a state."""
        if not AcceleratorState._shared_state:
            AcceleratorState._shared_state.update(self._state_of_accelerator)
        return self._accelerator

    @accelerator.setter
    def accelerator(self, made: Any) -> None:
        self._accelerator, self._state_of_accelerator = made, dict(AcceleratorState._shared_state)

    def create_accelerator_and_postprocess(self) -> None:
        """With a state of its own: one that is there may be of another precision, which accelerate refuses."""
        AcceleratorState._reset_state()
        super().create_accelerator_and_postprocess()
