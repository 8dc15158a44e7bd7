"""A table entry by name, or a person's own function as `file.py:function`; unknown names get the nearest known one."""

import difflib
import importlib
import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import ConfigError

NO_CODE = "TUNESMITH_NO_CODE"
"""Variable of a process whose recipe came over the network: it imports nothing that the recipe names."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known word, or an empty string.

    >>> did_you_mean("learnin_rate", ["learning_rate", "seed"])
    " Did you mean 'learning_rate'?"
    """
    nearest = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" Did you mean '{nearest[0]}'?" if nearest else ""


def lookup(table: Mapping[str, Any], name: str, what: str) -> Any:
    """The entry `name` of `table`, or the object that `file.py:function` or `package.module:function` names.

    Raises: ConfigError that names the nearest entry and lists all.
    """
    if name in table:
        return table[name]
    if ":" in name:
        return import_object(name, what)
    raise ConfigError(f"unknown {what} '{name}'.{did_you_mean(name, table)} Known: {', '.join(sorted(table))}.")


def import_object(reference: str, what: str) -> Any:
    """The object behind `file.py:name` or `package.module:name`.

    Raises: ConfigError if the file, the module or the name does not exist, and where `NO_CODE` is set.
    """
    if os.environ.get(NO_CODE):
        raise ConfigError(
            f"{what} '{reference}' names code, which a pasted recipe may not, nor one among the runs. Save it "
            "elsewhere and give its path."
        )
    place, _, attribute = reference.rpartition(":")
    if place.endswith(".py"):
        if not Path(place).is_file():
            raise ConfigError(f"{what} '{reference}': there is no file {place}.")
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{what} '{reference}': {error}.") from error
    if not hasattr(module, attribute):
        raise ConfigError(
            f"{what} '{reference}': {place} has no '{attribute}'.{did_you_mean(attribute, vars(module))}"
        )
    return getattr(module, attribute)
