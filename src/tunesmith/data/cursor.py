"""Where a stream stands, as JSON: what its readers keep in their cursors, at the moment it is asked for."""

import random
from collections.abc import Mapping
from typing import Any

from tunesmith.data.report import Report


def snapshot(cursor: Any) -> Any:
    """A copy of a cursor that is not changed by further reading, of what JSON can hold."""
    if isinstance(cursor, random.Random):
        return snapshot(cursor.getstate())
    if isinstance(cursor, Report):
        return snapshot(cursor.state())
    if isinstance(cursor, Mapping):
        return {key: snapshot(value) for key, value in cursor.items()}
    if isinstance(cursor, list | tuple):
        return [snapshot(value) for value in cursor]
    return cursor.tolist() if hasattr(cursor, "tolist") else cursor
