"""The least that every recipe needs, and the message of one that is wrong."""

import pytest

from tunesmith.errors import ConfigError
from tunesmith.recipe import load_recipe

BASE = "model_name_or_path: m\ndataset: d.jsonl\n"
NEEDED = {"model_name_or_path": "m", "dataset": "d.jsonl"}


def message(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(*args, **kwargs)
    return str(caught.value)
