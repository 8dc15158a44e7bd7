"""What a recipe says, each value over its stage's and the default: options, the trainer's arguments, decoding."""

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any, NamedTuple

from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from tunesmith.config import TrainingFields
from tunesmith.data.stream import FINISHED
from tunesmith.errors import ConfigError
from tunesmith.evaluate.generate import answer_decoding
from tunesmith.lookup import did_you_mean
from tunesmith.model.open import checked_attention
from tunesmith.ranks import num_processes
from tunesmith.recipe import Recipe, resolved
from tunesmith.runs import Run
from tunesmith.train.checkpoint import run_state_of
from tunesmith.train.contract import check_allowed
from tunesmith.train.curves import PER_TOKEN
from tunesmith.train.options import SFTConfig
from tunesmith.train.reward import RewardConfig, RewardTrainer
from tunesmith.train.sft import SFTTrainer

DEFAULT_SEED = 42
# Training options that an evaluation alone depends on.
EVALUATING = (
    *("bf16", "use_cpu", "padding_free", "per_device_eval_batch_size"),
    *("max_length", "packing", "packing_strategy", "eval_packing"),
    *("ignore_pad_token_for_loss", "padding_side", "pad_to_multiple_of"),
)


class Stage(NamedTuple):
    """What a stage of training is made of."""

    trainer: type
    config: type
    defaults: dict[str, Any] = {}  # noqa: RUF012 - never changed
    """Training options that differ from `TrainingFields` in this stage."""
    unit: str = PER_TOKEN
    """Of the loss, for the axis of its curve."""


STAGES: dict[str, Stage] = {
    "pt": Stage(SFTTrainer, SFTConfig, {"packing": True, "packing_strategy": "blocks", "train_on": "all"}),
    "sft": Stage(SFTTrainer, SFTConfig),
    "rm": Stage(RewardTrainer, RewardConfig, unit="nats per pair"),
}


def option(recipe: Recipe, name: str) -> Any:
    """A training option: the recipe's, else the stage's, else the default."""
    return training_options(recipe).get(name, getattr(TrainingFields, name))


def training_options(recipe: Recipe) -> dict[str, Any]:
    """The recipe's training options over those of its stage; a resolved recipe gives them all.

    Plain text has no answers: stage pt took the length of its blocks from `max_source_length`, and that is all.
    """
    unread = ("max_source_length", "max_target_length") if recipe.run.stage == "pt" else ()
    given = {name: value for name, value in recipe.training.items() if name not in unread}
    return {**STAGES[recipe.run.stage].defaults, **given}


def saved_options(recipe: Recipe) -> dict[str, Any]:
    """What `recipe.yaml` of a run holds: every option as it was resolved, those of the stage among them."""
    return resolved(dataclasses.replace(recipe, training=training_options(recipe)))


def seed_of(recipe: Recipe) -> int:
    """The seed of everything that is drawn."""
    return recipe.training.get("seed", DEFAULT_SEED)


def uses_cpu(recipe: Recipe) -> bool:
    """Whether a GPU is to be left alone."""
    return bool(recipe.training.get("use_cpu"))


def trainer_arguments(recipe: Recipe, folder: Run, checkpoint: Path | None = None) -> SFTConfig:
    """The training options as the stage's config; a run that goes on keeps the precision it was begun with."""
    # transformers takes disable_tqdm from its log level, which the command line lowers
    defaults = {"output_dir": str(folder.path), "seed": DEFAULT_SEED, "disable_tqdm": False}
    if recipe.data.streaming:
        defaults["dataset_kwargs"] = {"format": FINISHED, "on_bad_row": recipe.data.on_bad_row}
    if checkpoint is not None and not {"bf16", "fp16"} & recipe.training.keys():
        defaults |= precision_of(checkpoint)
    check_installed(recipe)
    try:
        return STAGES[recipe.run.stage].config(**{**defaults, **loss_of_pairs(recipe), **training_options(recipe)})
    except ConfigError:
        raise
    except ValueError as error:  # transformers checks combinations of its own
        raise ConfigError(f"the training options contradict each other: {error}") from error


def check_installed(recipe: Recipe) -> None:
    """Raise ConfigError for options whose words or packages are not there; known before any row is read."""
    check_allowed(recipe.training.get("resume_allow") or ())
    check_trackers(recipe.training.get("report_to"))
    checked_attention(recipe.model)
    check_deepspeed(recipe.training.get("deepspeed"))
    check_fsdp(recipe.training.get("fsdp"))
    if recipe.training.get("optim") == "adamw_anyprecision" and importlib.util.find_spec("torchdistx") is None:
        raise ConfigError("optim: adamw_anyprecision needs torchdistx, which is not installed. Take adamw_torch.")


def precision_of(checkpoint: Path) -> dict[str, bool]:
    """The type of products that a checkpoint's run has chosen: another probe might choose another."""
    terms = (run_state_of(checkpoint) or {}).get("terms", {})
    return {"bf16": terms["precision"] == "bfloat16"} if "precision" in terms else {}


def check_trackers(report_to: str | list[str] | None) -> None:
    """Raise ConfigError for a tracker that does not exist, or whose package is not installed."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in names:
        if name not in (*INTEGRATION_TO_CALLBACK, "all", "none"):
            trackers = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            hint = did_you_mean(name, INTEGRATION_TO_CALLBACK)
            raise ConfigError(f"report_to: there is no tracker '{name}'.{hint} Known: all, none, {trackers}.")
    known = get_available_reporting_integrations()
    if missing := [name for name in names if name in INTEGRATION_TO_CALLBACK and name not in known]:
        raise ConfigError(
            f"report_to: {missing[0]} is not installed. Install it: pip install {missing[0]}; or set report_to: none."
        )


def check_deepspeed(deepspeed: Any) -> None:
    """Raise ConfigError for a configuration of DeepSpeed where it is not installed."""
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("deepspeed: DeepSpeed is not installed. Install it: pip install deepspeed; or remove this.")


def check_fsdp(fsdp: Any) -> None:
    """Raise ConfigError where a model is to be shared out and one process is all there is."""
    if fsdp and num_processes() == 1:
        raise ConfigError(
            "fsdp: shares a model out over several processes, and there is one. Start the run with torchrun "
            "--nproc_per_node and their number, or remove fsdp."
        )


def check_warmup(recipe: Recipe, trainer: Any) -> None:
    """Raise ConfigError where the warmup takes longer than the epochs do, whose steps only the rows tell."""
    warmup, steps = trainer.args.warmup_steps, epoch_steps(trainer)
    if steps is not None and warmup > steps:
        raise ConfigError(
            f"{recipe.given.get('warmup_steps', 'the options')}: warmup_steps ({warmup:g}) is more than the {steps} "
            f"steps of {trainer.args.num_train_epochs:g} epochs over these rows. Lower it, or write a share of the "
            "run: warmup_steps: 0.1."
        )


def epoch_steps(trainer: Any) -> int | None:
    """Steps of a run that is told in epochs; `None` where they cannot be told from the number of rows."""
    args, rows = trainer.args, trainer.train_dataset
    if args.max_steps > 0 or args.tokens_per_batch or args.auto_find_batch_size or not hasattr(rows, "__len__"):
        return None
    batches = len(rows) / (args.train_batch_size * args.world_size)
    whole = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(whole / args.gradient_accumulation_steps)))


def evaluation_arguments(recipe: Recipe, folder: str) -> SFTConfig:
    """Arguments of a trainer that only evaluates, as it would while training."""
    options = training_options(recipe)
    given = {key: options[key] for key in EVALUATING if key in options} | loss_of_pairs(recipe)
    return STAGES[recipe.run.stage].config(output_dir=folder, save_strategy="no", disable_tqdm=False, **given)


def loss_of_pairs(recipe: Recipe) -> dict[str, str]:
    """Which rewards stage rm compares."""
    return {"reward_loss": recipe.run.reward_loss} if recipe.run.stage == "rm" else {}


def decoding(recipe: Recipe) -> dict[str, Any]:
    """How answers are written: the decoding options, with what transformers' options say of generation."""
    names = ("generation_max_length", "generation_num_beams", "max_target_length")
    return answer_decoding(recipe.decoding, **{name: recipe.training.get(name) for name in names})


def system_prompt(recipe: Recipe) -> str | None:
    """The system message to talk with: the recipe's, if it has one for all datasets."""
    prompt = recipe.data.system_prompt
    return prompt if isinstance(prompt, str) else None


def only(recipe: Recipe, **phase: bool) -> Recipe:
    """The recipe of a run directory for one phase alone; what was streamed there is read whole."""
    switches = {"do_train": False, "do_eval": False, "do_predict": False, **phase}
    data = dataclasses.replace(recipe.data, streaming=False)
    return dataclasses.replace(recipe, data=data, training={**recipe.training, **switches})
