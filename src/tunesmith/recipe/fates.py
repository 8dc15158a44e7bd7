"""What becomes of a key that is no option here: it turns into options, it is an error, or it is said to do nothing."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Kind = Literal["becomes", "told", "unread", "as_is"]


class Fate(NamedTuple):
    """What becomes of one foreign key. `None` as its value never needs anything."""

    kind: Kind
    takes: Any = Any
    """Type of the value; `Any`: whatever was written."""
    options: Callable[[Any], dict[str, Any]] = lambda value: {}
    """For `becomes`: the value → options of ours, none where it asks for what happens anyway; ValueError for a wrong
    one."""
    harmless: tuple = ()
    """For `told` and `unread`: values that ask for what happens anyway."""
    sentence: str = ""
    """For `told` and `unread`: why, and what to write instead. `{value}` stands for what was written."""


def becomes(takes: Any, options: Callable[[Any], dict[str, Any]]) -> Fate:
    """Options of ours say the same."""
    return Fate("becomes", takes, options)


def switch(on: dict[str, Any], off: dict[str, Any] | None = None) -> Fate:
    """A switch that stands for `on`, and for `off` when it is false."""
    return becomes(bool, lambda value: on if value else (off or {}))


def told(sentence: str, *harmless: Any) -> Fate:
    """An error: the run would not be what was asked for."""
    return Fate("told", type_of(harmless), harmless=harmless, sentence=sentence)


def unread(sentence: str, *harmless: Any) -> Fate:
    """Nothing reads it and the run is the same without it; said in a line, not an error."""
    return Fate("unread", type_of(harmless), harmless=harmless, sentence=sentence)


def as_is() -> Fate:
    """Whatever it says is the case anyway, or makes no difference that anyone could see."""
    return Fate("as_is")


def type_of(harmless: tuple) -> Any:
    """A switch, where only true or false is harmless: `no` means false."""
    return bool if harmless and all(isinstance(value, bool) for value in harmless) else Any


def each(names: str, fate: Fate) -> dict[str, Fate]:
    """The same fate for several keys, named in one text."""
    return dict.fromkeys(names.split(), fate)
