"""The answers of a run: held-out examples → answered prompts in a file, with their scores."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from tunesmith.data.normalize import Example
from tunesmith.evaluate.generate import context_length
from tunesmith.evaluate.metrics import metrics_for
from tunesmith.evaluate.predict import predict as answer
from tunesmith.evaluate.questions import ask, expected_texts, fitted
from tunesmith.recipe import Recipe
from tunesmith.steps.data import Prepared
from tunesmith.steps.options import decoding, seed_of


def written_metric(recipe: Recipe, data: Prepared) -> Any:
    """What scores written answers; a name or a package that is missing is told here, before the model loads."""
    default = "bleu_rouge" if recipe.training.get("predict_with_generate") else "exact_match"
    return metrics_for(recipe.run.metrics, default, references=expected_texts(data.held_out))


def check_prompts(recipe: Recipe, model: nn.Module, tokenizer: Any, examples: Sequence[Example]) -> None:
    """Raise DataError for a prompt that the model could not read: before the training, not after it."""
    if recipe.training.get("max_source_length") is None:  # which cuts such prompts
        kwargs = recipe.training.get("chat_template_kwargs")
        questions = [ask(example, tokenizer, None, index, kwargs) for index, example in enumerate(examples)]
        fitted(questions, tokenizer, None, context_length(model), examples)


def answered(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    path: Path,
    metric: Any,
    console: Console,
) -> dict[str, float]:
    """Answer the examples into a file, with a count on a terminal; returns the figures."""
    with console.status(f"answering {len(examples)} prompts") as status:
        return answer(
            model,
            tokenizer,
            examples,
            path,
            decoding=decoding(recipe),
            chat_template_kwargs=recipe.training.get("chat_template_kwargs"),
            metric=metric,
            max_source_length=recipe.training.get("max_source_length"),
            seed=seed_of(recipe),
            progress=lambda done, total: status.update(f"answered {done} of {total} prompts"),
        )
