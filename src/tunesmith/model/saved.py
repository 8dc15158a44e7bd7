"""`finetuning_args.json` beside what was trained: the model options, and what an adapter must know of its base."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import nn

from tunesmith.config import ModelFields
from tunesmith.model.adapt import has_adapter
from tunesmith.model.base import described
from tunesmith.model.chain import ARGUMENTS, read_json, remembered
from tunesmith.model.open import start_of, told_positions, unsaid
from tunesmith.model.rope import positions

PRIVATE = ("hf_token", "cache_dir", "trust_remote_code")
"""Options of a person or a machine, which stay there."""


def save_arguments(folder: str | Path, options: ModelFields, model: nn.Module | None = None) -> Path:
    """Write `finetuning_args.json` into `folder`; nothing of it is secret.

    Args:
        model: the model as `open_for_training` gave it. Of an adapter the file then also says which other adapters had
            been merged into its base (`merged_before`), how the base's positions were scaled (`positions`), and which
            base it was (`base`): the base's own files say none of it, and the adapter is nothing without.
    """
    found = {name: value for name, value in asdict(options).items() if name not in PRIVATE}
    if model is not None and has_adapter(model):
        found |= base_of_adapter(options, model) | {"base": described(model, folder)}
    path = Path(folder) / ARGUMENTS
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def base_of_adapter(options: ModelFields, model: nn.Module) -> dict[str, Any]:
    """What `load_any` needs beside the adapter's own files."""
    start = start_of(options, training=True, say=unsaid)
    scaled = options.rope_scaling is not None or told_positions(start)
    return {
        "merged_before": [str(Path(earlier).resolve()) for earlier in start.merged],
        "positions": positions(model.config) if scaled else None,
    }


def load_arguments(folder: str | Path) -> ModelFields:
    """The model options that `save_arguments` wrote; private ones have their defaults.

    Raises: ModelError for a file that is missing or damaged.
    """
    names = {field.name for field in fields(ModelFields)} - set(PRIVATE)
    found = remembered(folder) or read_json(Path(folder) / ARGUMENTS)
    return ModelFields(**{name: value for name, value in found.items() if name in names})
