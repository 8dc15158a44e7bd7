"""Where a run begins: in a new folder, or at the checkpoint that an earlier, unfinished run left in its own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.errors import CheckpointError
from tunesmith.runs import as_saved, checkpoints, prepare_output_dir, read_recipe, read_status, refuse_if_going

LAST = ("true", "last", "auto")  # words of resume_from_checkpoint for the newest one in output_dir
NONE = ("none", "false")
HOW = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")  # options that say where, and not what


class Beginning(NamedTuple):
    """The folder of a run, and the checkpoint that training goes on from."""

    folder: Path
    checkpoint: Path | None = None


def begin(output_dir: str | Path, *, overwrite: bool, resume_from_checkpoint: str | bool | None) -> Beginning:
    """Decide where a run begins; nothing is deleted unless `overwrite` says so.

    Without `resume_from_checkpoint` a run that was cut short goes on from its newest checkpoint: a killed job may be
    started again with the same words. `false` begins anew, `true` and `last` want a checkpoint to be there.

    Raises: CheckpointError where a checkpoint was asked for and there is none; ConfigError for a folder that is in
        the way: not empty and no run, a run that is finished, one that has no checkpoint, or one that is still going.
    """
    folder = Path(output_dir).expanduser()
    asked = str(resume_from_checkpoint).lower()
    if asked in LAST:
        checkpoint = last_checkpoint(folder)
        if checkpoint is None:
            raise CheckpointError(
                f"resume_from_checkpoint: {folder} holds no checkpoint to go on from. Leave the option out to begin "
                "anew, or name a folder like runs/mine/checkpoint-100."
            )
    elif asked in NONE:
        checkpoint = last_checkpoint(folder) if asked == "none" and not overwrite and was_cut_short(folder) else None
    else:
        checkpoint = named_checkpoint(str(resume_from_checkpoint))
    if checkpoint is not None and folder.resolve() in checkpoint.resolve().parents:
        refuse_if_going(folder)
        return Beginning(folder, checkpoint)
    return Beginning(prepare_output_dir(folder, overwrite), checkpoint)


def repeatable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for `recipe.yaml`, which repeats the run elsewhere: there is no checkpoint to go on from there."""
    name = "resume_from_checkpoint"
    is_word = str(options.get(name)).lower() in (*LAST, *NONE)
    return {key: value for key, value in options.items() if key != name or not is_word}


def is_complete(found: Beginning, options: Mapping[str, Any]) -> bool:
    """Whether the run in the folder has done all that `options` ask for, so that nothing is left to go on with."""
    folder, checkpoint = found
    if checkpoint is None or folder.resolve() not in checkpoint.resolve().parents:
        return False
    status, saved = read_status(folder) or {}, read_recipe(folder) or {}
    asked = as_saved(options)
    if any(saved.get(name) != asked.get(name) for name in saved.keys() | asked.keys() if name not in HOW):
        return False
    return status.get("state") == "completed" and is_last(checkpoint)


def is_last(checkpoint: Path) -> bool:
    """Whether a checkpoint was saved after the last step of its run."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_bytes())
        return state["global_step"] >= state["max_steps"] > 0
    except (OSError, ValueError, KeyError, TypeError):
        return False


def was_cut_short(folder: Path) -> bool:
    """Whether the folder holds a run that neither finished nor goes on."""
    state = (read_status(folder) or {}).get("state")
    return state is not None and state != "completed"


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the highest step that was written whole."""
    return next((path for path in reversed(checkpoints(folder).values()) if is_whole(path)), None)


def named_checkpoint(name: str) -> Path:
    """The checkpoint folder that a person named."""
    path = Path(name).expanduser()
    if not is_whole(path):
        raise CheckpointError(
            f"resume_from_checkpoint: {name} holds no trainer_state.json, so it is no checkpoint. "
            "Name a folder like runs/mine/checkpoint-100, or say true for the last one in output_dir."
        )
    return path


def is_whole(path: Path) -> bool:
    """Whether the trainer finished writing: its state is written last."""
    return (path / "trainer_state.json").is_file()
