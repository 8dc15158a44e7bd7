"""What is looked at before an earlier run is deleted: that this one reads nothing of it, and has what it needs."""

from collections.abc import Iterator
from pathlib import Path

from tunesmith.data.collect import sources_of
from tunesmith.data.load import data_files
from tunesmith.data.report import Report
from tunesmith.errors import ConfigError
from tunesmith.model.chain import adapter_folders
from tunesmith.recipe import Recipe
from tunesmith.steps.model import tokenizer_of
from tunesmith.steps.options import check_installed


def look_before_deleting(recipe: Recipe, folder: Path) -> None:
    """Stop, while the run in `folder` is still there, for what the new one would stop at at once.

    Raises: ConfigError also for a model or data that lie in the folder; ModelError and DataError for such as are
        nowhere.
    """
    for option, place in places_read(recipe):
        if Path(place).expanduser().resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"output_dir: {folder} holds what this run reads ({option}: {place}), and overwrite_output_dir would "
                "delete it. Name another output_dir."
            )
    check_installed(recipe)
    tokenizer_of(recipe)


def places_read(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Files and folders that a run reads, each with its option; raises DataError for data that are not there."""
    if recipe.model.model_name_or_path:
        yield "model_name_or_path", recipe.model.model_name_or_path
    for adapter in adapter_folders(recipe.model.checkpoint_dir):
        yield "checkpoint_dir", adapter
    for option in ("dataset", "eval_dataset"):
        names = getattr(recipe.data, option)
        for source in sources_of(recipe.data, names) if names else ():
            if not source.is_hub:
                data_files(source.place, Report(), source.name)
                yield option, source.place
