"""Stand-in: replaced by the normalizer of the data branch."""

from tunesmith.errors import DataError


class RowError(DataError):
    """One row is wrong; `reason` is the short word under which the report counts it."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason
