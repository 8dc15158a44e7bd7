"""The memory of a run before it starts: recipe and token rows → what a step takes, beside what this machine has."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from tunesmith.deliver.summary import memory_lines
from tunesmith.errors import ConfigError
from tunesmith.model.capabilities import usable_bytes
from tunesmith.model.load import first_line
from tunesmith.model.sketch import sketch
from tunesmith.recipe import Recipe
from tunesmith.runs import Run
from tunesmith.steps.options import option, trainer_arguments, uses_cpu
from tunesmith.train.choose import memory_of, products_of, settled
from tunesmith.train.largest import largest_batch
from tunesmith.train.memory import Batch, Memory
from tunesmith.train.reward import largest_pairs


def memory_json(recipe: Recipe, rows: Any) -> dict[str, Any]:
    """The estimate as data: bytes of each part, what this machine has, and what would help where that is less.

    No weight is loaded. Where the model's config cannot be had, or does not tell its sizes, there is only a `reason`.
    """
    try:
        args, batch, products, memory = told(recipe, rows)
        if memory is None:
            return {"reason": "the model's config does not tell its sizes"}
        usable = usable_bytes(args.device)
        figures: dict[str, Any] = {
            **memory.to_json(),
            "usable": None if usable == float("inf") else round(usable),
            "tokens": batch.tokens,
            "trained_tokens": batch.trained,
            "products": products,
            "gradient_checkpointing": bool(args.gradient_checkpointing),
            "checkpoint": round(
                memory.gradients + memory.optimizer
            ),  # trained weights, and what their optimizer keeps
            "free_disk": free_disk(str(option(recipe, "output_dir") or ".")),
        }
        if memory.total > usable:
            figures["helps"] = helps(recipe, rows, memory)
    except ConfigError:  # training would not begin either
        raise
    except Exception as error:  # a model's own code may do anything; training will say what is wrong
        return {"reason": f"{type(error).__name__}: {first_line(error)}"}
    return figures


def free_disk(output_dir: str) -> int:
    """Bytes that are free where the run will be written."""
    folder = Path(output_dir).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def told(recipe: Recipe, rows: Any) -> tuple[Any, Batch, str, Memory | None]:
    """Settled arguments, largest micro-batch, the type of products and the memory, as training will find them."""
    args = trainer_arguments(recipe, Run(option(recipe, "output_dir") or "unwritten", writes=False))
    model = sketch(recipe.model, use_cpu=uses_cpu(recipe))
    if recipe.run.stage == "rm" and hasattr(rows, "column_names"):
        batch = largest_pairs(rows, args)
    else:
        batch = largest_batch(rows, args)
    args, _ = settled(args, model, None, batch)
    return args, batch, products_of(args, model), memory_of(args, model, batch)


def helps(recipe: Recipe, rows: Any, memory: Memory) -> dict[str, int]:
    """Options that lower the estimate, each alone, and the total it would come to."""
    training, model = recipe.training, recipe.model
    tried = {
        "per_device_train_batch_size: 1": {"training": {**training, "per_device_train_batch_size": 1}},
        "tokens_per_batch: 1024": {"training": {**training, "tokens_per_batch": 1024}},
        "gradient_checkpointing: true": {"training": {**training, "gradient_checkpointing": True}},
        "adapter: lora": {"model": dataclasses.replace(model, adapter="lora")},
        "adapter: lora with load_in_4bit: true": {
            "model": dataclasses.replace(model, adapter="lora", load_in_4bit=True, load_in_8bit=False)
        },
    }
    tried.pop("per_device_train_batch_size: 1" if training.get("tokens_per_batch") else "tokens_per_batch: 1024")
    if model.checkpoint_dir:  # which says what may train
        tried = {name: change for name, change in tried.items() if "model" not in change}
    found = {}
    for name, change in tried.items():
        other = told(dataclasses.replace(recipe, **change), rows)[-1]
        if other is not None and other.total < 0.95 * memory.total:
            found[name] = round(other.total)
    return found


def show_memory(figures: dict[str, Any], console: Console) -> None:
    """The estimate as a small table."""
    for line in memory_lines(figures):
        console.out(line, highlight=False)
