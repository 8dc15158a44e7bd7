"""What a person gave, with its place, and what is wrong with it."""

from typing import Any, NamedTuple

from tunesmith.errors import ConfigError

FILE, MAPPING, PYTHON, FLAG = range(4)  # layers: a recipe file or a dict, keywords, flags; the higher one wins


class Given(NamedTuple):
    """One value that a person gave."""

    spelled: str
    """The key as written."""
    value: Any
    where: str
    """`recipe.yaml:7`, `--key` or `argument key`."""
    layer: int
    line: int = 0
    text: str | None = None
    """The characters of a plain scalar, for text options: `run_name: 010`."""
    key: str = ""
    """The canonical name."""

    def says(self, sentence: str) -> str:
        """`sentence` with the place and the key in front, naming the key once."""
        return f"{self.where}: {self.spelled}: {sentence}" if self.layer == FILE else f"{self.where}: {sentence}"


class Problems:
    """What is wrong, collected so that one report names everything."""

    def __init__(self, source: str):
        self.source = source
        self.found: list[tuple[int, int, str]] = []
        self.keys: set[str] = set()
        self.notes: list[str] = []
        """Lines to print before the run: nothing is wrong, but a person may not expect it."""

    def add(self, given: Given, message: str, key: str = "") -> None:
        """Record a message about `given`; `key` is the option that the contradiction checks then leave alone."""
        self.found.append((given.layer, given.line, message))
        self.keys.add(key or given.key)

    def raise_any(self) -> None:
        """Raise all problems as one ConfigError, in file order, flags last."""
        lines = [message for _, _, message in sorted(self.found, key=lambda problem: problem[:2])]
        if len(lines) == 1:
            raise ConfigError(lines[0])
        if lines:
            raise ConfigError("\n  ".join([f"{len(lines)} problems in {self.source}:", *lines]))
