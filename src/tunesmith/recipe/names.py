"""Which keys there are, and what each means: `Given`s as written → `Given`s under the names of our options.

A key is an option, an alias of one, or a key of another program or another year with a `Fate`; anything else is an
error that names the nearest. Nothing is ignored in silence.
"""

from functools import cache
from typing import Any

from tunesmith.config import ALIASES
from tunesmith.lookup import did_you_mean
from tunesmith.recipe.coerce import coerce
from tunesmith.recipe.fates import Fate
from tunesmith.recipe.given import FILE, FLAG, Given, Problems
from tunesmith.recipe.llamafactory import KEYS, TOLD_WORDS, WORDS
from tunesmith.recipe.schema import options
from tunesmith.recipe.transformers4 import OLD_KEYS, OLD_WORDS

FOREIGN: dict[str, Fate] = OLD_KEYS | KEYS


@cache
def annotation_of(key: str) -> Any:
    """The type that a key takes under any of its names; `None` for a key that nobody knows."""
    if key in FOREIGN:
        return FOREIGN[key].takes
    option = options().get(ALIASES.get(key, key))
    return option.annotation if option else None


def named(given: list[Given], problems: Problems) -> list[Given]:
    """The values under the names of our options; what other programs' keys need saying goes to `problems.notes`."""
    result: list[Given] = []
    for item in given:
        key = ALIASES.get(item.spelled, item.spelled)
        if item.spelled in FOREIGN:
            if not overruled(item, given):
                result += translated(item, FOREIGN[item.spelled], problems)
        elif key in options():
            result += in_our_words(item._replace(key=key), problems)
        else:
            unknown(item, problems)
    return result


def overruled(item: Given, given: list[Given]) -> bool:
    """Whether a higher layer gives the same foreign key: its options need not be those of this one."""
    return any(other.spelled == item.spelled and other.layer > item.layer for other in given)


def translated(item: Given, fate: Fate, problems: Problems) -> list[Given]:
    """What a foreign key says in options of ours; none where that is nothing, or an error."""
    value = item.value
    if value is None:
        return []
    try:
        value = value if fate.takes is Any else coerce(value, fate.takes, item.text)
        ours = fate.options(value)
    except ValueError as error:
        problems.add(item, item.says(str(error)), item.spelled)
        return []
    sentence = fate.sentence.replace("{value}", str(value))
    if fate.kind == "told" and value not in fate.harmless:
        problems.add(item, item.says(f"{sentence}."), item.spelled)
    elif fate.kind == "unread" and value not in fate.harmless:
        problems.notes.append(item.says(sentence))
    return [item._replace(key=key, value=found, text=None) for key, found in ours.items()]


def in_our_words(item: Given, problems: Problems) -> list[Given]:
    """The value, with another program's word for it replaced by ours."""
    value = item.value[0] if isinstance(item.value, list) and len(item.value) == 1 else item.value
    if not isinstance(value, str | bool | None):
        return [item]
    if value in TOLD_WORDS.get(item.key, {}):
        problems.add(item, item.says(TOLD_WORDS[item.key][value].replace("{value}", str(value))))
        return []
    words = (WORDS | OLD_WORDS).get(item.key, {})
    return [item._replace(value=words[value], text=None) if value in words else item]


def unknown(item: Given, problems: Problems) -> None:
    """Report a key that nobody knows, with the nearest that is known."""
    convertible = [key for key, fate in FOREIGN.items() if fate.kind == "becomes"]
    hint = did_you_mean(item.spelled, [*options(), *ALIASES, *convertible])
    what = f"{item.where}: unknown key '{item.spelled}'"
    if item.layer != FILE:
        what = f"unknown {'flag' if item.layer == FLAG else 'option'} '{item.where.removeprefix('argument ')}'"
    nearest = hint.split("'")[1] if hint else item.spelled
    problems.add(item, f"{what}.{hint}", ALIASES.get(nearest, nearest))
