"""Keys inside an option that takes a mapping: a misspelled one is told with the others, not by a library mid-run."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping

from tunesmith.lookup import did_you_mean
from tunesmith.recipe.given import Given, Problems
from tunesmith.recipe.schema import options


def scheduler_keys(scheduler: str) -> list[str] | None:
    """What `lr_scheduler_kwargs` may hold for a schedule; `None`: nobody knows."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    if scheduler in ("constant", "constant_with_warmup"):  # transformers hands them nothing
        return []
    found = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(scheduler)]).parameters
    if any(one.kind is one.VAR_KEYWORD for one in found.values()):
        return None
    taken = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}  # said by the rest of the run
    return [name for name in found if name not in taken]


def checkpointing_keys(_: str) -> list[str]:
    """What `gradient_checkpointing_kwargs` may hold: what torch takes beside the function and its arguments."""
    from torch.utils.checkpoint import checkpoint

    found = inspect.signature(checkpoint).parameters.values()
    return [one.name for one in found if one.kind is one.KEYWORD_ONLY or one.name == "use_reentrant"] + [
        "preserve_rng_state"
    ]


def accelerator_keys(_: str) -> list[str]:
    """What `accelerator_config` may hold."""
    from transformers.trainer_pt_utils import AcceleratorConfig

    return [field.name for field in dataclasses.fields(AcceleratorConfig)]


KEYS: dict[str, Callable[[str], list[str] | None]] = {
    "lr_scheduler_kwargs": scheduler_keys,
    "gradient_checkpointing_kwargs": checkpointing_keys,
    "accelerator_config": accelerator_keys,
}


def check_nested(chosen: Mapping[str, Given], problems: Problems) -> None:
    """Add each key inside an option that the option does not have."""
    scheduler = chosen["lr_scheduler_type"].value if "lr_scheduler_type" in chosen else None
    scheduler = scheduler or options()["lr_scheduler_type"].default
    for option, item in chosen.items():
        if option not in KEYS or not isinstance(item.value, Mapping) or not item.value:
            continue
        known = KEYS[option](getattr(scheduler, "value", scheduler))
        of = f" of {getattr(scheduler, 'value', scheduler)}" if option == "lr_scheduler_kwargs" else ""
        for key in item.value if known is not None else ():
            if key not in known:
                takes = f"takes {', '.join(known)}" if known else "takes nothing"
                problems.add(
                    item, item.says(f"unknown key '{key}'.{did_you_mean(key, known)} The option{of} {takes}.")
                )
