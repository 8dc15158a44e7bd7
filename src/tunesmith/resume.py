"""Where a run begins: in a new folder, or at the checkpoint that an earlier, unfinished run left in its own."""

from pathlib import Path
from typing import NamedTuple

from tunesmith.errors import CheckpointError
from tunesmith.runs import checkpoints, prepare_output_dir, read_status, refuse_if_going

LAST = ("true", "last", "auto")  # words of resume_from_checkpoint for the newest one in output_dir


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
    elif asked in ("none", "false"):
        checkpoint = last_checkpoint(folder) if asked == "none" and not overwrite and was_cut_short(folder) else None
    else:
        checkpoint = named_checkpoint(str(resume_from_checkpoint))
    if checkpoint is not None and folder.resolve() in checkpoint.resolve().parents:
        refuse_if_going(folder)
        return Beginning(folder, checkpoint)
    return Beginning(prepare_output_dir(folder, overwrite), checkpoint)


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
