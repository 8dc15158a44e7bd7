"""docs/compatibility.md says of LLaMA-Factory's keys and defaults what the code says."""

import re
from pathlib import Path

import pytest

from tests.recipe.their_keys import ERA, HEAD, TRANSFORMERS_4
from tunesmith.config import ALIASES
from tunesmith.recipe.llamafactory import CONVERSIONS, TOLD, WORDS
from tunesmith.recipe.schema import options
from tunesmith.recipe.yaml12 import scalar

PAGE = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
PAGE = PAGE[PAGE.index("# Coming from LLaMA-Factory") :]
DEFAULTS = re.findall(
    r"^\| `(\w+)`(?: \(`(\w+)`\))? \| ([^|]*) \| ([^|]*) \| ([^|]*) \|", PAGE[PAGE.index("## Defaults") :], re.M
)
NAMED = {key for words in re.findall(r"`([^`\n]+)`", PAGE) for key in re.findall(r"\w+", words)}


# workflow: A2 A3 A4 A5
@pytest.mark.parametrize("row", DEFAULTS, ids=[row[0] for row in DEFAULTS])
def test_the_table_of_defaults_holds_the_defaults(row):
    option, alias, *shown, ours = row
    assert not alias or ALIASES[alias] == option
    for table, text in zip((ERA, HEAD), shown, strict=True):
        defaults = {key: value for key, value in (TRANSFORMERS_4 | table).items() if key != "max_length"}  # not ours
        names = [name for name in (alias, option) if name in defaults]
        assert text == "-" if not names else scalar(text) == defaults[names[0]]
    assert scalar(ours) == options()[option].default


# workflow: A2 A3 A4 A5
def test_every_default_that_differs_stands_in_the_table():
    listed = {row[0] for row in DEFAULTS}
    for table in (ERA, HEAD):
        for key, value in table.items():
            option = options().get(ALIASES.get(key, key))
            if option is not None and option.name not in listed:
                assert WORDS.get(option.name, {}).get(value, value) == option.default, key


def test_every_alias_and_every_key_that_is_converted_or_told_is_named():
    theirs = ERA.keys() | HEAD.keys()
    assert (ALIASES.keys() & theirs | CONVERSIONS.keys() | TOLD.keys()) - NAMED == set()
