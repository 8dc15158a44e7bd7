"""SFTConfig: tunesmith's training options and those of transformers in one dataclass."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments

from tunesmith.config import TrainingFields
from tunesmith.errors import ConfigError

NOT_DONE = {"label_smoothing_factor": 0.0, "neftune_noise_alpha": None, "predict_with_generate": False}


@dataclass
class SFTConfig(TrainingFields, Seq2SeqTrainingArguments):
    """All options of `SFTTrainer`: tunesmith's own (`TrainingFields`) and those of `Seq2SeqTrainingArguments`.

    `bf16`, `gradient_checkpointing` and `padding_free` may be `None`: the trainer chooses for hardware and model.
    """

    model_init_kwargs: dict[str, Any] | None = None
    """Arguments of `from_pretrained` when the trainer is given a model's name."""

    def __post_init__(self):
        for name, unset in NOT_DONE.items():
            if getattr(self, name) != unset:
                raise ConfigError(f"{name}: SFTTrainer's own loss does not know it yet. Remove it.")
        if not torch.accelerator.is_available():
            self.use_cpu = True  # transformers refuses bf16 on a CPU that it was not told to use
        # transformers 5.2x renamed gradient_checkpointing; `None` (choose for me) must survive its defaults
        asked = self.gradient_checkpointing
        if hasattr(self, "activation_checkpointing"):
            asked = self.activation_checkpointing if asked is None else asked
            self.activation_checkpointing, self.gradient_checkpointing = asked, None
        self.choose_checkpointing = asked is None
        super().__post_init__()
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = False
