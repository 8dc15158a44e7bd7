"""tunesmith: fine-tune language models on your own examples, and see that it worked.

Names are imported on first use (PEP 562), so `import tunesmith` takes milliseconds.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "SFTTrainer": "train.sft",
    "SFTConfig": "train.options",
    "RewardTrainer": "train.reward",
    "RewardConfig": "train.reward",
    "ModelConfig": "config",
    "DataConfig": "config",
    "DecodingConfig": "config",
    "DataCollatorForCompletionOnlyLM": "train.completion_only",
    "ConstantLengthDataset": "train.constant_length",
    "setup_chat_format": "model.chat_format",
    "clone_chat_template": "model.chat_format",
    "get_quantization_config": "model.utility",
    "get_peft_config": "model.utility",
    "get_kbit_device_map": "model.utility",
    "mix_datasets": "data.mix",
    "load_recipe": "recipe",
    "run": "workflow",
    "TunesmithError": "errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tunesmith' has no attribute '{name}'")
    return getattr(importlib.import_module(f"tunesmith.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
