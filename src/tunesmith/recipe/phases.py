"""Which parts of a run a recipe asks for: training, evaluation, prediction."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tunesmith.config import Recipe


class Phases(NamedTuple):
    """The parts of a run, in their order."""

    train: bool
    evaluate: bool
    predict: bool


def phases(recipe: Recipe) -> Phases:
    """The parts of `tunesmith train` that a recipe asks for.

    With none of `do_train`, `do_eval` and `do_predict` a run trains, and evaluates what is held out. Where only
    `do_eval` or `do_predict` is said, nothing is trained, as in LLaMA-Factory and transformers' scripts.
    """
    return asked_for(recipe.training, has_held_out(vars(recipe.data)))


def asked_for(said: Mapping[str, Any], held_out: bool) -> Phases:
    """The phases for the switches that were given."""
    train, evaluate, predict = (said.get(name) for name in ("do_train", "do_eval", "do_predict"))
    if train is None:
        train = not (evaluate or predict)
    return Phases(train, bool(train and held_out) if evaluate is None else evaluate, bool(predict))


def has_held_out(data: Mapping[str, Any]) -> bool:
    """Whether there are held-out examples beside the training data."""
    return bool(data["eval_dataset"]) or data["val_size"] > 0
