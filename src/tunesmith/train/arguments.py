"""What the trainer's constructor is given, checked before anything is loaded: each mistake with the way out."""

import inspect
import os
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import nn
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

from tunesmith.errors import ConfigError, DataError
from tunesmith.lookup import did_you_mean
from tunesmith.train.options import SFTConfig, UnknownOption, why_unknown

FUNCTIONS = (
    *("data_collator", "model_init", "compute_metrics", "preprocess_logits_for_metrics", "formatting_func"),
    "compute_loss_func",
)
TRL_HOOKS = ("_prepare_dataset", "_prepare_packed_dataloader", "_prepare_non_packed_dataloader", "_prepare_peft_model")


def explains_arguments(construct: Callable[..., None]) -> Callable[..., None]:
    """Let a constructor say what an unknown keyword should have been, or where it belongs; a decorator."""
    known = inspect.signature(construct).parameters.keys() - {"self"}

    @wraps(construct)
    def checked(self: Any, *args: Any, **given: Any) -> None:
        for name, value in given.items():
            if name in known:
                continue
            if name in SFTConfig.__dataclass_fields__:
                why = f"is an option of SFTConfig: SFTTrainer(..., args=SFTConfig({name}={value!r}))."
            elif name in ("load_in_8bit", "load_in_4bit"):
                why = why_unknown(name, known)
            else:
                why = f"there is no such argument.{did_you_mean(name, known)}"
            raise UnknownOption(f"SFTTrainer: {name}: {why}")
        construct(self, *args, **given)

    return checked


def check_arguments(trainer: Any, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for what cannot be used as the argument that it was given as, and for hooks nobody calls."""
    model = given["model"]
    if not isinstance(model, nn.Module | str | os.PathLike | None):
        what = "the class" if isinstance(model, type) else type(model).__name__
        raise ConfigError(f"SFTTrainer: model: expected a model, a folder or a Hub id, got {what} {model!r}.")
    for name in FUNCTIONS:
        if given[name] is not None and not callable(given[name]):
            raise ConfigError(f"SFTTrainer: {name}: expected a function, got {given[name]!r}.")
    if not isinstance(given["callbacks"], list | tuple | None):
        raise ConfigError(f"SFTTrainer: callbacks: expected a list of them, got {given['callbacks']!r}.")
    for callback in given["callbacks"] or ():
        if not hasattr(callback, "on_train_begin"):
            raise ConfigError(f"SFTTrainer: callbacks: expected TrainerCallbacks, got {callback!r} among them.")
    optimizers = given["optimizers"]
    if not isinstance(optimizers, tuple | list) or len(optimizers) != 2:
        raise ConfigError(
            f"SFTTrainer: optimizers: expected a pair (optimizer, scheduler), one of which may be None, got a "
            f"{type(optimizers).__name__}."
        )
    for name in TRL_HOOKS:
        if hasattr(type(trainer), name):
            raise ConfigError(
                f"{type(trainer).__name__}.{name} overrides a hook of TRL that nothing calls here. Give a "
                "formatting_func or tokenized rows (input_ids, labels) instead, and remove it."
            )


def check_output_dir(path: str) -> None:
    """Raise ConfigError for a file: that the run cannot be saved there must not come out when it has been trained."""
    if os.path.exists(path) and not os.path.isdir(path):
        raise ConfigError(f"output_dir: {path} is a file. Name a folder.")


def unless_default(data_collator: Any, say: Callable[[str], None]) -> Any:
    """The collator, or `None` for the one that TRL 0.13 had as its default, which knows no label but all tokens.

    Raises: ConfigError for masked language modelling, which a causal model cannot be trained on.
    """
    if type(data_collator) is not DataCollatorForLanguageModeling:
        return data_collator
    if data_collator.mlm:
        raise ConfigError("data_collator: mlm=True masks words, which no causal model learns from. Give mlm=False.")
    say("labels: those of train_on; DataCollatorForLanguageModeling(mlm=False), TRL's default, is not needed for them")
    return None


def makes_labels(data_collator: Any) -> bool | None:
    """Whether a collator makes labels of `input_ids`, and trips on a column of them; `None`: nobody can know."""
    if isinstance(data_collator, DataCollatorForLanguageModeling):
        return True
    return False if isinstance(data_collator, DataCollatorForSeq2Seq) else None


def num_embeddings(model: nn.Module) -> int | None:
    """How many ids the model knows; `None` for a module of one's own."""
    return model.get_input_embeddings().weight.shape[0] if hasattr(model, "get_input_embeddings") else None


def check_ids(name: str, dataset: Any, limit: int | None) -> None:
    """Raise DataError for `input_ids` in a table that are not from 0 to below `limit`, with the row.

    A GPU would answer them with an assertion that names no row. Ids behind a transform are not looked at.
    """
    is_table = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
    if not is_table or "input_ids" not in dataset.column_names or limit is None:
        return
    rows = dataset.with_format("arrow").select_columns(["input_ids"])[:]["input_ids"]
    is_list = pa.types.is_list(rows.type) or pa.types.is_large_list(rows.type)
    if len(rows) and not (is_list and pa.types.is_integer(rows.type.value_type)):
        raise DataError(f"{name}: input_ids are {rows.type}, not lists of whole numbers. Tokenize the rows.")
    if rows.null_count:
        row = pc.index(pc.is_null(rows), True).as_py() + 1
        raise DataError(f"{name} row {row}: input_ids are null. Leave the row out.")
    ids = np.concatenate(
        [np.zeros(0, np.int64), *(part.flatten().to_numpy(zero_copy_only=False) for part in rows.chunks)]
    )
    strange = (ids < 0) | (ids >= limit)
    if strange.any():
        first = int(strange.argmax())
        row = np.searchsorted(np.cumsum(pc.list_value_length(rows).to_numpy()), first, side="right") + 1
        raise DataError(
            f"{name} row {row}: input_ids hold {ids[first]}, but the model has embeddings for 0 to {limit - 1}. "
            "Take the tokenizer of this model, and -100 in labels only."
        )


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Raise ConfigError if a person's optimizer holds no weight of the model that trains: the model would stay as is.

    It happens where it was made of a model before `peft_config` froze that, or of another model.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters() if parameter.requires_grad):
        raise ConfigError(
            "optimizers: the optimizer holds none of the weights that train, so nothing would be learned. Make it of "
            "the model that is given here (with an adapter: of get_peft_model(model, ...), without peft_config), or "
            "give optimizer_cls_and_kwargs."
        )
