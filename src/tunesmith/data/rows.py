"""What a file is made of, before anybody has looked inside: rows, and rows that cannot be used."""

from typing import Any, NamedTuple

from tunesmith.data.report import place
from tunesmith.errors import DataError


class Row(NamedTuple):
    """One row of a file, before anybody has looked inside."""

    value: dict[str, Any]
    """Column → value; a line of a text file is `{"text": line}`."""
    source: str
    """The file as the person named it, or the Hub id."""
    line: int
    """From 1: line of the file (jsonl, csv, txt), or number of the row (json array, parquet, Hub)."""


class RowError(DataError):
    """One row cannot be used: the sentence, a short stable `reason` to count it under, and where it is."""

    # Defaults for all but the message, so that the error survives the way back from a worker process.
    def __init__(self, message: str, reason: str = "bad-row", source: str = "", line: int = 0):
        super().__init__(message)
        self.reason = reason
        self.source = source
        self.line = line

    def at(self, source: str, line: int, where: str = "") -> "RowError":
        """The same problem with its place in front: `where`, or what `place` makes of the two."""
        return RowError(f"{where or place(source, line)}: {self}", self.reason, source, line)

    def at_line(self, path: str, line: int) -> "RowError":
        """As `at`, where `line` is a line of the file whatever the file's type."""
        return self.at(path, line, f"{path}:{line}")


def without_nulls(value: Any, depth: int = 0) -> Any:
    """Objects inside a row without keys that are null: a table fills in every key that some other row has."""
    if isinstance(value, dict):
        return {k: without_nulls(v, depth + 1) for k, v in value.items() if v is not None or depth == 0}
    if isinstance(value, list) and value and isinstance(value[0], dict | list):
        return [without_nulls(item, depth + 1) for item in value]
    return value
