"""The model of a run: recipe → tokenizer, and the model to train or to answer with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from tunesmith.data.templates import use_template
from tunesmith.model.chain import adapter_folders
from tunesmith.model.load import check_vocabulary
from tunesmith.model.open import open_for_answers, open_for_training, open_tokenizer
from tunesmith.model.value_head import RewardModel, has_head, read_head
from tunesmith.recipe import Recipe
from tunesmith.steps.options import option, seed_of, uses_cpu
from tunesmith.train.processing import changed


def tokenizer_of(recipe: Recipe, say: Callable[[str], None] | None = None) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer that the recipe's model brings, with the recipe's template."""
    if recipe.model.trust_remote_code and say is not None:
        say(f"trust_remote_code: {code_of(str(recipe.model.model_name_or_path))} will run")
    tokenizer = open_tokenizer(recipe.model, say=say)
    asked = {key: recipe.training[key] for key in ("eos_token", "pad_token") if recipe.training.get(key)}
    if recipe.training.get("chat_template"):  # which needs to know the tokens asked for, and may bring its own
        tokenizer = use_template(changed(tokenizer, asked), recipe.training["chat_template"])
    return changed(tokenizer, asked)


def code_of(name: str) -> str:
    """Which files a model brings that transformers may run."""
    files = sorted(path.name for path in Path(name).expanduser().glob("*.py"))
    if Path(name).expanduser().is_dir():
        return f"{', '.join(files) or 'no file'} of {name}"
    return f"the Python files of {name}"


def trainable_model(recipe: Recipe, tokenizer: Any, say: Callable[[str], None]) -> nn.Module:
    """The base model with what the recipe trains of it."""
    model = open_for_training(
        recipe.model,
        tokenizer,
        seed=seed_of(recipe),
        max_length=option(recipe, "max_length"),
        use_cpu=uses_cpu(recipe),
        say=say,
    )
    return with_value_head(recipe, model)


def usable_model(recipe: Recipe, tokenizer: Any, say: Callable[[str], None]) -> nn.Module:
    """The model for inference, on the fastest device."""
    folder = last_folder(recipe)
    head = read_head(folder) if recipe.run.stage == "rm" else None  # before a model is loaded for nothing
    model = open_for_answers(recipe.model, use_cpu=uses_cpu(recipe), say=say)
    check_vocabulary(model, tokenizer)
    return model if head is None else RewardModel(model, head)


def with_value_head(recipe: Recipe, model: nn.Module) -> nn.Module:
    """In stage rm the model with the value head of the last folder that it comes from, if one lies there."""
    folder = last_folder(recipe)
    if recipe.run.stage != "rm" or not has_head(folder):
        return model  # a trainer of rewards begins a new one
    return RewardModel(model, read_head(folder))


def last_folder(recipe: Recipe) -> str:
    """Where the weights that came last lie: the last adapter, else the model itself."""
    return [str(recipe.model.model_name_or_path), *adapter_folders(recipe.model.checkpoint_dir)][-1]
