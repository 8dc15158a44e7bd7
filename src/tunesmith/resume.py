"""Where a run begins: in a new folder, or at the checkpoint that an earlier, unfinished run left in its own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.checkpoints import STATE_FILE, Last, checkpoints, named_checkpoint, newest_checkpoint
from tunesmith.runs import as_saved, prepare_output_dir, read_recipe, read_status, refuse_if_going, what_is_in

LAST = ("true", "last", "auto")  # words of resume_from_checkpoint for the newest one in output_dir
NONE = ("none", "false")
HOW = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")  # options that say where, and not what


class Beginning(NamedTuple):
    """The folder of a run, and the checkpoint that training goes on from."""

    folder: Path
    checkpoint: Path | None = None
    skipped: tuple[str, ...] = ()
    """A line for each newer checkpoint that cannot be used, and for a run that was deleted."""


def begin(output_dir: str | Path, *, overwrite: bool, resume_from_checkpoint: str | bool | None) -> Beginning:
    """Decide where a run begins; nothing is deleted unless `overwrite` says so.

    Without `resume_from_checkpoint` a run that was cut short goes on from its newest checkpoint: a killed job may be
    started again with the same words. `false` begins anew, `true` and `last` want a checkpoint to be there. A damaged
    checkpoint is skipped, and the one before it is taken.

    Raises: CheckpointError where a checkpoint was asked for and there is none, or all are damaged; ConfigError for a
        folder that is in the way: not empty and no run, a run that is finished, one that has no checkpoint, or one
        that is still going.
    """
    folder = Path(output_dir).expanduser()
    asked, found = str(resume_from_checkpoint).lower(), Last(None, [])
    goes_on = asked == "none" and not overwrite and was_cut_short(folder) and checkpoints(folder)
    if asked in LAST or goes_on:
        found = newest_checkpoint(folder)
    elif asked not in NONE:
        found = Last(named_checkpoint(Path(str(resume_from_checkpoint))), [])
    if found.path is not None and folder.resolve() in found.path.resolve().parents:
        refuse_if_going(folder)
        return Beginning(folder, found.path, tuple(found.skipped))
    gone = (
        (f"overwrite_output_dir: {folder} {held}, which is deleted",)
        if overwrite and (held := what_is_in(folder))
        else ()
    )
    return Beginning(prepare_output_dir(folder, overwrite), found.path, gone)


def repeatable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for `recipe.yaml`, which repeats the run elsewhere: there is no checkpoint to go on from there."""
    name = "resume_from_checkpoint"
    is_word = str(options.get(name)).lower() in (*LAST, *NONE)
    return {key: value for key, value in options.items() if key != name or not is_word}


def is_complete(found: Beginning, options: Mapping[str, Any]) -> bool:
    """Whether the run in the folder has done all that `options` ask for, so that nothing is left to go on with."""
    folder, checkpoint = found.folder, found.checkpoint
    if checkpoint is None or folder.resolve() not in checkpoint.resolve().parents:
        return False
    status, saved = read_status(folder) or {}, read_recipe(folder) or {}
    asked = as_saved(options)
    if any(saved.get(name) != asked.get(name) for name in saved.keys() | asked.keys() if name not in HOW):
        return False
    has_model = any(folder.glob("*.safetensors"))  # it may have been moved away, and is then written again
    return status.get("state") == "completed" and has_model and is_last(checkpoint)


def is_last(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved after the last step of its run."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_bytes())
        return state["global_step"] >= state["max_steps"] > 0
    except (OSError, ValueError, KeyError, TypeError):
        return False


def was_cut_short(folder: Path) -> bool:
    """Whether the folder holds a run that neither finished nor goes on."""
    state = (read_status(folder) or {}).get("state")
    return state is not None and state != "completed"
