"""CheckpointTrainer: transformers' trainer whose checkpoints are whole or not there, and whose resume is exact.

write into a hidden folder ─ seal with hashes ─ rename ─ delete the oldest          (files: tunesmith.checkpoints)
find the newest that verifies ─ compare its terms ─ check its tensors ─ load ─ take up counters and random numbers
"""

import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from tunesmith.checkpoints import (
    STATE_FILE,
    clean,
    flushed,
    named_checkpoint,
    newest_checkpoint,
    publish,
    remove_tree,
    retain,
    seal,
    staged,
    total_bytes,
)
from tunesmith.errors import CheckpointError, ConfigError
from tunesmith.model.load import first_line
from tunesmith.ranks import first_decides
from tunesmith.train.accelerator import OwnAccelerator
from tunesmith.train.contract import check_allowed, compare, terms

logger = logging.getLogger(__name__)

RUN_STATE_FILE = "run_state.json"
STREAM_FILE = "stream.json"
OF_TORCH = ("inline_container", "PytorchStreamWriter")  # whose RuntimeErrors say that a file could not be written
SPARE = 1.2  # of the last checkpoint's size must be free before the next is begun
SCHEDULE_TERMS = {"learning_rate", "schedule", "length"}
GROUP_SETTINGS = ("weight_decay", "betas", "eps", "momentum")


class CheckpointTrainer(OwnAccelerator):
    """Saves in one rename, resumes bit for bit or says why not.

    Attributes:
        resumed_from: the checkpoint that this session went on from.
        skipped_checkpoints: a line for each newer one that could not be used.
        accepted_changes: a line for each term of the run that differs from the checkpoint's, and may.
    """

    resumed_from: Path | None = None
    _steps_uncounted = 0  # of earlier sessions whose losses nobody handed on
    verified: Path | None = None
    """A checkpoint that somebody has verified already, so that its hashes are not taken twice."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.skipped_checkpoints: list[str] = []
        self.accepted_changes: list[str] = []
        self._changed_terms: set[str] = set()
        self._terms: dict[str, Any] | None = None
        self._must_restore = self._random_due = False
        self._epoch_before: tuple[int, int] | None = None
        self._last_rows: Any = None
        self.add_callback(EpochOfStream(self))
        self._largest_checkpoint = 0

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train, from the start or from a checkpoint that verifies.

        Raises: CheckpointError where the checkpoint is damaged, is none, or belongs to another run.
        """
        check_allowed(self.args.resume_allow)
        self._terms, self._changed_terms = None, set()
        if trial is None:
            first_decides(lambda: clean(self.args.output_dir), use_cpu=self.args.use_cpu)
        self.resumed_from = self._asked_for(resume_from_checkpoint)
        self._must_restore, self._random_due = self.resumed_from is not None, False
        self._epoch_before = None
        if self.resumed_from is not None:
            for line in self.compare_terms(self.resumed_from):
                logger.warning("%s", line)
            self._take_up_stream(self.resumed_from)
            self._largest_checkpoint = total_bytes(self.resumed_from)
        return super().train(self.resumed_from and str(self.resumed_from), trial, *args, **kwargs)

    # ---- finding -------------------------------------------------------------------------------------------------

    def _asked_for(self, asked: str | bool | None) -> Path | None:
        """The checkpoint to go on from: the newest that verifies for `True`, else the one that is named."""
        if asked is None or asked is False:
            return None
        if asked is not True:
            if not isinstance(asked, str | os.PathLike):
                raise ConfigError(f"resume_from_checkpoint: expected a checkpoint's folder or True, got {asked!r}.")
            return first_decides(lambda: named_checkpoint(Path(asked), self.verified), use_cpu=self.args.use_cpu)
        found = first_decides(lambda: newest_checkpoint(self.args.output_dir), use_cpu=self.args.use_cpu)
        self.skipped_checkpoints = found.skipped
        for line in found.skipped:
            logger.warning("%s", line)
        return found.path

    def compare_terms(self, checkpoint: Path) -> list[str]:
        """A line for each difference from the run that wrote the checkpoint, as far as it may be.

        Raises: CheckpointError if the checkpoint was trained otherwise.
        """
        saved = run_state_of(checkpoint)
        if saved is None:
            return [f"resume: {checkpoint} says nothing of the run that wrote it, so nothing was compared"]
        now = as_json(self._run_terms())
        self.accepted_changes = compare(saved["terms"], now, self.args.resume_allow, str(checkpoint))
        self._changed_terms = {name for name in now if name in saved["terms"] and saved["terms"][name] != now[name]}
        return self.accepted_changes

    def _run_terms(self) -> dict[str, Any]:
        """What this run trains, with what; found once, for it reads all rows."""
        if self._terms is None:
            self._terms = terms(self)
        return self._terms

    # ---- saving --------------------------------------------------------------------------------------------------

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As transformers', when the trainer is made. Raises: ConfigError where the Hub is not reached, or refuses."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # of huggingface_hub, its HTTP client, or the network
            raise ConfigError(
                f"push_to_hub: the Hub does not take {self.args.hub_model_id or Path(self.args.output_dir).name}: "
                f"{first_line(error)}. Log in (hf auth login), or leave push_to_hub out and send the folder "
                "afterwards: hf upload NAME FOLDER."
            ) from error

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write, seal and publish `checkpoint-<step>`; the oldest go once it is there."""
        run, step = Path(self._get_output_dir(trial=trial)), self.state.global_step
        if trial is None:
            self.store_flos()
        self._note_best(run, step)
        folder = staged(run, step)
        with flushed(folder) if self.args.should_save else nullcontext():
            error = self._met(self._try(lambda: self._write(run, folder)))
        if error is None:
            error = self._met(self._try(lambda: self._publish(run, folder, step)))
        if error is not None:
            self._saving_failed(run, folder, error)
            return
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / folder.name))

    def _write(self, run: Path, folder: Path) -> None:
        """Every process writes what is its own into the staging folder."""
        check_room(run, self._largest_checkpoint)
        self.save_model(str(folder), _internal_call=True)
        folder.mkdir(parents=True, exist_ok=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            write_json(folder / self._counters_file, self._counters())
            if (position := self._position()) is not None:
                write_json(folder / STREAM_FILE, position)
        if self.args.should_save:
            self._export_callbacks()
            self.state.save_to_json(str(folder / STATE_FILE))
            state = {"terms": self._run_terms(), "accepted": self.accepted_changes, "threads": torch.get_num_threads()}
            write_json(folder / RUN_STATE_FILE, state)

    def _publish(self, run: Path, folder: Path, step: int) -> None:
        """The writing process seals the folder, shows it under its name, and deletes the oldest."""
        if not self.args.should_save:
            return
        seal(folder, step=step, processes=self.args.world_size)
        self._largest_checkpoint = max(self._largest_checkpoint, total_bytes(publish(folder, run)))
        keep = {self.state.best_global_step} if self.state.best_model_checkpoint else set()
        retain(run, self.args.save_total_limit, keep | {step}, newest=step)

    def _try(self, function: Any) -> Exception | None:
        """The error of a write, in place of raising it: the other processes must hear of it first."""
        try:
            function()
        except (OSError, SafetensorError) as error:
            return error
        except RuntimeError as error:
            if not any(word in str(error) for word in OF_TORCH):
                raise
            return error
        return None

    def _met(self, error: Exception | None) -> Exception | None:
        """Wait for all processes; this one's error, or one that stands for another's."""
        if self.args.world_size == 1:
            return error
        failed = torch.tensor(float(error is not None), device=self.args.device)
        if not self.accelerator.reduce(failed, "sum").item():
            return None
        return error or OSError("another process could not write its part")

    def _saving_failed(self, run: Path, folder: Path, error: Exception) -> None:
        """Remove what was written, and stop or go on as `on_save_failure` says."""
        if self.args.should_save:
            remove_tree(folder.parent)
        message = why_not_saved(folder.name, run, error, self._largest_checkpoint)
        if self.args.on_save_failure == "stop":
            raise CheckpointError(f"{message} Earlier checkpoints are untouched.") from error
        logger.warning("%s Training goes on (on_save_failure: continue).", message)

    def save_trained(self) -> None:
        """Write the trained model into `output_dir`, or, so that it is not lost, into a temporary folder.

        Raises: CheckpointError where it had to be the latter, or was neither.
        """
        error = self._met(self._try(self.save_model))
        if error is None:
            return
        run, refuge = Path(self.args.output_dir), Path(tempfile.gettempdir())
        if self.args.should_save:
            refuge = Path(tempfile.mkdtemp(prefix=f"{run.name}-"))
        kept = self._met(self._try(lambda: self.save_model(str(refuge), _internal_call=True))) is None
        if not kept and self.args.should_save:
            remove_tree(refuge)
        where = f"It lies in {refuge}." if kept else "Make room, and train again: a run goes on from its checkpoints."
        raise CheckpointError(
            f"the trained model could not be written to {run}: {reason_of(error)}. {where}"
        ) from error

    def _note_best(self, run: Path, step: int) -> None:
        """Say where the best checkpoint is, or is about to be."""
        best = self.state.best_global_step
        if best and (best == step or (run / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(run / f"checkpoint-{best}")

    def _export_callbacks(self) -> None:
        """Put what callbacks want kept into the trainer's state, as transformers does."""
        kept: dict[str, Any] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                kept.setdefault(type(callback).__name__, []).append(callback.state())
        for name, states in kept.items():
            self.state.stateful_callbacks[name] = states if len(states) > 1 else states[0]

    # ---- counters ------------------------------------------------------------------------------------------------

    @property
    def _counters_file(self) -> str:
        return "counters.json" if self.args.world_size == 1 else f"counters_{self.args.process_index}.json"

    def _counters(self) -> dict[str, Any]:
        """What this process has summed since the last log line, and over the run."""
        return {
            "loss": float(self._tr_loss),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
        }

    def _restore_counters(self, saved: Mapping[str, Any]) -> None:
        self._tr_loss.fill_(saved["loss"])
        self._total_loss_scalar = saved["total_loss"]
        self._globalstep_last_logged = saved["last_logged"]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The micro-batches of the next step; before the first one of a resumed session, its counters are taken up."""
        self._restore_once()
        batches, count = super().get_batch_samples(*args, **kwargs)
        if self._random_due:
            self._random_due = False
            self._load_rng_state(str(self.resumed_from))
        self._last_rows = batches[-1].get("rows") if batches and hasattr(batches[-1], "get") else None
        return batches, count

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Sum up; where the checkpoint was that of the last step, what is summed up is what it kept."""
        if self._must_restore:
            self._restore_once()
            self._random_due = False
            self._load_rng_state(str(self.resumed_from))
        return super()._finalize_training(*args, **kwargs)

    # ---- streams -------------------------------------------------------------------------------------------------

    def _position(self) -> dict[str, Any] | None:
        """Where the stream of training rows stands; `None` where there is none, or it cannot be taken up."""
        position = getattr(self.train_dataset, "position", None)
        if position is None or self._last_rows is None or self.args.world_size > 1 or not self._last_rows.rows:
            return None
        return position(self._last_rows.rows[-1])

    def _take_up_stream(self, checkpoint: Path) -> None:
        """Let the stream begin where it stood, so that no row is read again; otherwise rows are counted off."""
        path = checkpoint / STREAM_FILE
        if not path.is_file() or not hasattr(self.train_dataset, "take_up") or self.args.world_size > 1:
            return
        position = json.loads(path.read_text(encoding="utf-8"))
        self._random_due = self.train_dataset.take_up(position)
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        batches = self.args.max_steps * self.args.gradient_accumulation_steps
        epoch, share = divmod(state["epoch"], 1)
        done = round(share * batches)
        self._epoch_before = (int(epoch), done) if self._random_due else (int(epoch) + 1, 0)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Epochs and batches to pass over: none where the stream stands there already."""
        found = super()._init_training_state(*args, **kwargs)
        return found if self._epoch_before is None else (0, 0)

    def _restore_once(self) -> None:
        """Counters as they were when the checkpoint was written, before the first step of a session that goes on."""
        if not self._must_restore:
            return
        self._must_restore, checkpoint = False, self.resumed_from
        if "best" in self._changed_terms:
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        counters = checkpoint / self._counters_file
        if counters.is_file():
            self._restore_counters(json.loads(counters.read_text(encoding="utf-8")))
        else:  # another program wrote it
            self._steps_uncounted = self.state.global_step
        best, run = self.state.best_global_step, checkpoint.parent
        if best and (run / f"checkpoint-{best}").is_dir():  # the run may have been moved since
            self.state.best_model_checkpoint = str(run / f"checkpoint-{best}")

    # ---- loading -------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        check_tensors(Path(resume_from_checkpoint), target)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Nothing: `check_tensors` has found all there is to say, and knows which weights are tied."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            need(Path(checkpoint), "optimizer.pt", "scheduler.pt")
        asked = [
            {name: group[name] for name in GROUP_SETTINGS if name in group} for group in self.optimizer.param_groups
        ]
        rates = list(getattr(self.lr_scheduler, "base_lrs", ()))
        with only_tensors(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
        if "optimizer" in self._changed_terms:
            for group, settings in zip(self.optimizer.param_groups, asked, strict=True):
                group.update(settings)
        if SCHEDULE_TERMS & self._changed_terms:
            follow_schedule(self.optimizer, self.lr_scheduler, rates)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """After the first batches were made, for a loader's iterator draws a number; collators draw their own."""
        if checkpoint is None or self._random_due:
            return
        several = self.args.world_size > 1
        if (run_state_of(Path(checkpoint)) or {}).get("terms", {}).get("processes", 1) == self.args.world_size:
            need(Path(checkpoint), f"rng_state_{self.args.process_index}.pth" if several else "rng_state.pth")
        with only_tensors(checkpoint, "rng_state.pth"):
            super()._load_rng_state(checkpoint)


class EpochOfStream(TrainerCallback):
    """Counts epochs on where a stream was taken up: transformers begins at 0 then."""

    def __init__(self, trainer: CheckpointTrainer):
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: D102
        if self.trainer._epoch_before is None:
            return
        batches = args.max_steps * args.gradient_accumulation_steps
        epoch, done = self.trainer._epoch_before
        here, share = divmod(state.epoch, 1)
        before = done if here == 0 else 0
        state.epoch = epoch + int(here) + (before + round(share * batches)) / batches


# Finding -----------------------------------------------------------------------------------------------------------


def run_state_of(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint says of its run; `None` where another program wrote it."""
    path = checkpoint / RUN_STATE_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def need(checkpoint: Path, *names: str) -> None:
    """Raise CheckpointError for a file without which going on would silently be something else."""
    missing = [name for name in names if not (checkpoint / name).is_file()]
    if missing:
        raise CheckpointError(
            f"resume_from_checkpoint: {checkpoint} holds no {' and no '.join(missing)}, so training cannot go on as "
            "it was (save_only_model leaves them out). Name another checkpoint, or begin a new run from these "
            f"weights: model_name_or_path: {checkpoint}."
        )


@contextmanager
def only_tensors(checkpoint: str | Path, names: str) -> Iterator[None]:
    """Say which file was refused where `torch.load(weights_only=True)` found something else than data in it."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":
            raise
        raise CheckpointError(
            f"resume_from_checkpoint: {names} of {checkpoint} holds more than tensors and numbers. It would run code "
            "when opened, and was not opened. Do not trust this folder."
        ) from error


def as_json(value: Any) -> Any:
    """A value as it will be read back."""
    return json.loads(json.dumps(value))


def write_json(path: Path, value: Any) -> None:
    """Write a file of the staging folder; `seal` brings it to disk."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


# Room --------------------------------------------------------------------------------------------------------------


def check_room(run: Path, last_bytes: int) -> None:
    """Raise OSError before a checkpoint is begun that would not fit beside the ones that are there."""
    run.mkdir(parents=True, exist_ok=True)
    if last_bytes and shutil.disk_usage(run).free < SPARE * last_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def why_not_saved(name: str, run: Path, error: Exception, last_bytes: int) -> str:
    """What happened to a checkpoint, where, what it needs and what there is."""
    free = shutil.disk_usage(run).free if run.is_dir() else 0
    needs = f"A checkpoint takes {last_bytes / 1e9:.2f} GB, and" if last_bytes else "There,"
    return (
        f"{name} could not be written to {run}: {reason_of(error)}. {needs} {free / 1e9:.2f} GB are free. Make room, "
        "set save_total_limit, or choose another output_dir."
    )


def reason_of(error: Exception) -> str:
    """Why a write failed, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error).rstrip(".")


# Tensors -----------------------------------------------------------------------------------------------------------


def check_tensors(checkpoint: Path, model: nn.Module) -> None:
    """Raise CheckpointError for a weight that is missing, has another shape, or has no place in the model."""
    found, expected = saved_shapes(checkpoint), None
    if found is not None:
        expected = expected_shapes(model, adapter=(checkpoint / "adapter_model.safetensors").is_file())
    if found is None or expected is None:
        return
    missing = sorted(expected.keys() - found.keys() - tied_elsewhere(model, found.keys()))
    strange = sorted(found.keys() - expected.keys())
    others = [name for name in sorted(found.keys() & expected.keys()) if found[name] != expected[name]]
    lines = [f"{name} is missing" for name in missing] + [f"{name} is not in the model" for name in strange]
    lines += [f"{name} has shape {found[name]} in place of {expected[name]}" for name in others]
    if lines:
        more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
        raise CheckpointError(
            f"resume_from_checkpoint: the weights of {checkpoint} are not those of this model: {'; '.join(lines[:5])}"
            f"{more}. Name a checkpoint of this model, with the adapter settings it was trained with."
        )


def saved_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]] | None:
    """Name → shape of the weights in safetensors files; `None` where there are none."""
    names = ("adapter_model.safetensors", "model.safetensors")
    paths = [path for name in names if (path := checkpoint / name).is_file()][:1]
    paths = paths or sorted(checkpoint.glob("model-*-of-*.safetensors"))
    found: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
    return found or None


def expected_shapes(model: nn.Module, *, adapter: bool) -> dict[str, tuple[int, ...]] | None:
    """Name → shape of what the model would save; `None` for models that save in ways of their own."""
    if adapter and hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0])
        return {name: tuple(value.shape) for name, value in state.items()}
    if adapter or not isinstance(model, PreTrainedModel):
        return None
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in ignored}


def tied_elsewhere(model: nn.Module, found: Any) -> set[str]:
    """Weights that are another name of one that was saved."""
    names: dict[int, list[str]] = {}
    for name, value in model.state_dict().items():
        names.setdefault(value.data_ptr(), []).append(name)
    return {name for group in names.values() if any(one in found for one in group) for name in group}


# Schedules ---------------------------------------------------------------------------------------------------------


def follow_schedule(optimizer: Any, scheduler: Any, rates: Sequence[float]) -> None:
    """After loading, take the base rates and the schedule of this run in place of the checkpoint's.

    Args:
        rates: base rate of each group as this run asks for it.
    """
    loaded = list(getattr(scheduler, "base_lrs", ()))
    lambdas = getattr(scheduler, "lr_lambdas", None)
    for index, group in enumerate(groups_of(optimizer)):
        if index < len(rates):
            scale = rates[index] / loaded[index] if loaded[index] else 1.0
            rate = rates[index] * lambdas[index](scheduler.last_epoch) if lambdas else group["lr"] * scale
            group["lr"], group["initial_lr"] = rate, rates[index]
    if rates:
        scheduler.base_lrs = list(rates)
        scheduler._last_lr = [group["lr"] for group in groups_of(optimizer)]


def groups_of(optimizer: Any) -> Iterator[dict[str, Any]]:
    """Parameter groups of an optimizer, accelerate's wrapper or not."""
    return iter(optimizer.param_groups)
