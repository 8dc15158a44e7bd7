"""What a checkpoint was trained with: written into it, and held against the run that would go on from it.

A difference that would train other tokens or other weights is an error. One that a person may want, such as another
learning rate, is an error too until `resume_allow` names it; then it is applied, and recorded.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from torch.utils.data import IterableDataset

from tunesmith import __version__
from tunesmith.errors import CheckpointError, ConfigError
from tunesmith.lookup import did_you_mean
from tunesmith.model.adapt import has_adapter
from tunesmith.model.base import sample

ALLOWABLE = {
    "learning_rate": "the new rate is used from the next step on",
    "schedule": "the rest of the run follows the new schedule",
    "length": "the schedule is that of the new length",
    "optimizer": "the new settings are used; moments stay",
    "batch": "rows are counted in the new batches, so some may be trained twice or not at all in this epoch",
    "loss": "the new loss is used",
    "precision": "the result is not bit for bit that of an uninterrupted run",
    "weights": "the result is not bit for bit that of an uninterrupted run",
    "processes": "the result is not bit for bit that of an uninterrupted run",
    "versions": "the result may not be bit for bit that of an uninterrupted run",
}
"""Term → what happens where `resume_allow` names it."""
ACCEPTED = {"best": "the best checkpoint is looked for anew"}
"""Term → what happens where it differs, which needs no leave."""
PACKAGES = ("torch", "transformers", "peft")
OPTIMIZER = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")
LOSS = (
    *("loss_type", "label_smoothing_factor", "neftune_noise_alpha", "router_aux_loss_coef"),
    *("ignore_pad_token_for_loss", "reward_loss"),
)
ADAPTER = (
    *("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save", "use_dora", "use_rslora", "bias"),
    *("lora_dropout", "rank_pattern", "alpha_pattern"),
)
UNNAMED = ("schedule", "length", "optimizer", "optimizer_arguments", "loss", "batch")  # their entries say it all
QUANTIZATION = (
    *("quant_method", "bits", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
)
ROWS_AT_ONCE = 10_000
SAMPLED_ROWS = 64


def terms(trainer: Any) -> dict[str, Any]:
    """The terms of a trainer's run, as JSON can hold them."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    trained = [(name, list(one.shape)) for name, one in model.named_parameters() if one.requires_grad]
    size = args.gradient_accumulation_steps * args.world_size
    return {
        "data": data_identity(trainer.train_dataset),
        **tokenizer_identity(trainer.tokenizer),
        "seed": {"seed": args.seed, "data_seed": args.data_seed},
        "trainable": {"tensors": len(trained), "shapes": text_digest(repr(sorted(trained)))},
        "adapter": adapter_identity(model),
        **base_identity(model),
        "model": model_identity(model),
        "weights": types_of(model),
        "best": best_identity(trainer),
        "optimizer_name": str(getattr(args.optim, "value", args.optim)),
        "optimizer_arguments": {name: getattr(args, name) for name in ("optim_args", "loraplus_lr_ratio")},
        "reduce_lr_on_plateau": plateau_identity(args),
        "learning_rate": args.learning_rate,
        "schedule": {
            "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "lr_scheduler_kwargs": args.lr_scheduler_kwargs or None,
            "warmup_steps": args.warmup_steps,
        },
        "length": {"num_train_epochs": float(args.num_train_epochs), "max_steps": args.max_steps},
        "optimizer": {name: getattr(args, name) for name in OPTIMIZER},
        "batch": {
            "rows_per_step": None if args.tokens_per_batch else args.per_device_train_batch_size * size,
            "tokens_per_step": args.tokens_per_batch and args.tokens_per_batch * size,
            "order": args.train_sampling_strategy,
            "drop_last": args.dataloader_drop_last,
            "data_collator": None if getattr(trainer, "_own_batches", True) else name_of(trainer.data_collator),
        },
        "loss": {
            **{name: getattr(args, name, None) for name in LOSS},
            "compute_loss_func": name_of(trainer.compute_loss_func),
        },
        "precision": "float16" if args.fp16 else "bfloat16" if args.bf16 else "float32",
        "processes": args.world_size,
        "versions": {"tunesmith": __version__, **{name: metadata.version(name) for name in PACKAGES}},
    }


def compare(saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str], checkpoint: str) -> list[str]:
    """Hold the terms of a checkpoint against those of the run that goes on from it.

    Returns: a line for each difference that is accepted.

    Raises: CheckpointError that names every other, its old and its new value; ConfigError for a name in `allowed` that
        is no term that may be allowed.
    """
    check_allowed(allowed)
    refused, accepted = [], []
    now = {name: as_far_as_known(saved[name], value) for name, value in now.items() if name in saved}
    for name in now:
        if saved[name] == now[name]:
            continue
        lines = [
            f"{key}: {old} in the checkpoint, {new} now" for key, old, new in differences(name, saved[name], now[name])
        ]
        if name in allowed or name in ACCEPTED or (name == "length" and is_longer(saved[name], now[name])):
            accepted += [f"resume: {line} ({(ALLOWABLE | ACCEPTED)[name]})" for line in lines]
        else:
            refused += [(name, line) for line in lines]
    if refused:
        raise CheckpointError(refusal(refused, checkpoint))
    return accepted


def as_far_as_known(old: Any, new: Any) -> Any:
    """`new` without what a checkpoint of an earlier tunesmith does not tell."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return new
    return {key: value for key, value in new.items() if key in old}


def check_allowed(allowed: Sequence[str]) -> None:
    """Raise ConfigError for a name of `resume_allow` that is none."""
    for name in allowed:
        if name not in ALLOWABLE:
            raise ConfigError(
                f"resume_allow: '{name}' is nothing that may differ.{did_you_mean(name, ALLOWABLE)} "
                f"Known: {', '.join(ALLOWABLE)}."
            )


def refusal(refused: Sequence[tuple[str, str]], checkpoint: str) -> str:
    """The sentence for differences that bar the way."""
    said = "".join(f"\n  {line}" for _, line in refused)
    names = list(dict.fromkeys(name for name, _ in refused))
    allowable = [name for name in names if name in ALLOWABLE]
    ways = ["Set it back"] + ([f"allow it with resume_allow: [{', '.join(allowable)}]"] if allowable else [])
    if len(allowable) < len(names):
        fixed = ", ".join(name for name in names if name not in ALLOWABLE)
        ways = [
            "Set it back",
            f"begin a new run from these weights (model_name_or_path: {checkpoint}; {fixed} cannot be allowed)",
        ]
    return f"resume_from_checkpoint: {checkpoint} was trained otherwise:{said}\n{', or '.join(ways)}."


def differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of what differs; of a mapping its entries."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        yield name, old, new
        return
    for key in [*old, *(key for key in new if key not in old)]:
        if old.get(key) != new.get(key):
            yield (
                f"{name}.{key}" if name not in UNNAMED else key,
                old.get(key),
                new.get(key),
            )


def is_longer(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether the run was only made longer, in the same unit."""
    if old["max_steps"] > 0 or new["max_steps"] > 0:
        return new["max_steps"] >= old["max_steps"] > 0
    return new["num_train_epochs"] >= old["num_train_epochs"]


# What things are ---------------------------------------------------------------------------------------------------


def text_digest(text: str) -> str:
    """A short hash of a text."""
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def tokenizer_identity(tokenizer: Any) -> dict[str, str | None]:
    """Hashes of a tokenizer and of its chat template; `None` where there is none."""
    if tokenizer is None:
        return {"tokenizer": None, "chat_template": None}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    template = getattr(tokenizer, "chat_template", None)
    found = None if template is None else text_digest(repr(template))
    return {"tokenizer": text_digest(rules), "chat_template": found}


def adapter_identity(model: Any) -> dict[str, Any] | None:
    """What a peft adapter is made of; `None` where all is trained as it is."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    config = next(iter(configs.values()))
    found = {name: getattr(config, name, None) for name in ADAPTER}
    return {name: plain(value) for name, value in found.items()}


def base_identity(model: Any) -> dict[str, str]:
    """A hash over what lies frozen under an adapter; of a model that came from no files, nothing."""
    found = sample(model) if has_adapter(model) else None
    return {} if found is None else {"base": found}


def model_identity(model: Any) -> dict[str, Any]:
    """How a model computes with its weights: its positions, and the bits that it holds them in."""
    config = getattr(model, "config", None)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(config, "quantization_config", None)
    bits = found.to_dict() if hasattr(found, "to_dict") else found
    return {
        "positions": getattr(inner, "rope_parameters", None),
        "quantization": bits and {name: plain(bits[name]) for name in QUANTIZATION if name in bits},
    }


def types_of(model: Any) -> str:
    """The types of the weights, and how many tensors have each."""
    found = Counter(str(one.dtype).removeprefix("torch.") for one in model.parameters())
    return ", ".join(f"{name} ({number})" for name, number in sorted(found.items()))


def plateau_identity(args: Any) -> list[Any] | None:
    """Rate and settings of a schedule that waits for evaluations: what it has found out holds for these alone."""
    if str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)) != "reduce_lr_on_plateau":
        return None
    return [args.learning_rate, args.lr_scheduler_kwargs or None]


def best_identity(trainer: Any) -> dict[str, Any] | None:
    """What says which checkpoint is the best, and on which rows; `None` where nobody asks."""
    args, rows = trainer.args, trainer.eval_dataset
    if args.metric_for_best_model is None:
        return None
    sets = rows if isinstance(rows, Mapping) else {"": rows}
    return {
        "metric_for_best_model": args.metric_for_best_model,
        "greater_is_better": args.greater_is_better,
        "eval_dataset": {name: None if one is None else data_identity(one) for name, one in sets.items()},
    }


def name_of(given: Any) -> str | None:
    """What a function of the person's is called, or the class of an object."""
    return None if given is None else getattr(given, "__qualname__", type(given).__qualname__)


def plain(value: Any) -> Any:
    """Sets in order, enumerations by value."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)


def data_identity(dataset: Any) -> dict[str, Any]:
    """How many rows there are and a hash of what is in them; of a stream, what it says of its sources."""
    if hasattr(dataset, "identity"):
        return dataset.identity()
    if isinstance(dataset, datasets.Dataset):
        return {"rows": len(dataset), "hash": table_digest(dataset)}
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return {"stream": type(dataset).__name__}
    found = xxhash.xxh3_128()
    for index in np.linspace(0, len(dataset) - 1, min(len(dataset), SAMPLED_ROWS)).astype(int).tolist():
        found.update(repr(listed(dataset[index])).encode())
    return {"rows": len(dataset), "hash": found.hexdigest()}


def table_digest(dataset: datasets.Dataset) -> str:
    """A hash of all columns, that does not depend on how they are cut into chunks or selected."""
    found, rows = xxhash.xxh3_128(), dataset.with_format("arrow")
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        table = rows[begin : begin + ROWS_AT_ONCE]
        for name in sorted(table.column_names):
            found.update(name.encode())
            add_column(found, table[name].combine_chunks())
    return found.hexdigest()


def add_column(found: Any, values: Any) -> None:
    """Add an Arrow array to a hash: numbers by their bytes, lists by their lengths and what is in them."""
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks)
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        add_column(found, pc.list_value_length(values))
        add_column(found, values.flatten())
    elif pa.types.is_integer(values.type) and not values.null_count:
        found.update(np.ascontiguousarray(values.to_numpy(zero_copy_only=False).astype(np.int64)))
    elif pa.types.is_floating(values.type) and not values.null_count:
        found.update(np.ascontiguousarray(values.to_numpy(zero_copy_only=False).astype(np.float64)))
    else:
        found.update(repr(values.to_pylist()).encode("utf-8", "surrogatepass"))


def listed(value: Any) -> Any:
    """A row with its tensors and arrays as lists."""
    if isinstance(value, Mapping):
        return {key: listed(item) for key, item in sorted(value.items())}
    return value.tolist() if hasattr(value, "tolist") else value
