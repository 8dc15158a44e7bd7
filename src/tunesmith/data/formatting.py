"""A `formatting_func` of the person's: rows in, rows of text or turns out.

Two generations of such functions exist. The older takes a batch (a dict of lists) and returns a list; the newer, and
the older under packing, takes one row and returns one text. Which one a function is, is found by calling it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tunesmith.data.formats import columns_of, kind_of
from tunesmith.data.report import place, visible
from tunesmith.data.rows import Row, RowError
from tunesmith.errors import DataError

PROBE_ROWS = 8  # rows of the first call, which finds out how the function wants to be called
CONTRACT = (
    "The formatting_func should return a list of processed strings since it can lead to silent bugs."  # TRL v0.13's
)
FAILED = "formatting-failed"


class Formatter:
    """A formatting function and how it is called, found at the first rows.

    What it returns for a row is a text, an example (`{"messages": ...}`, `{"prompt": ..., "completion": ...}`,
    `{"text": ...}`) or a list of turns; for a batch, a list of one of these per row.
    """

    def __init__(self, function: Callable[[dict[str, Any]], Any]):
        self.function = function
        self.name = visible(getattr(function, "__qualname__", type(function).__name__), 60)
        self.takes_batches: bool | None = None

    def __call__(self, rows: Sequence[Row], on_error: Callable[[Row, RowError], None] | None = None) -> list[Row]:
        """The rows with their values replaced by what the function makes of them.

        Args:
            on_error: called with a row on which the function fails, which is then left out; `None`: it raises.

        Raises: RowError with the row, the function and the columns it was given; DataError where a batched function
            returns one text for many rows.
        """
        if not rows:
            return []
        if self.takes_batches is None:
            self.takes_batches = self._settle(rows[:PROBE_ROWS], may_skip=on_error is not None)
        if self.takes_batches:
            try:
                return self._of_batch(rows)
            except RowError:
                if len(rows) == 1 and on_error is None:
                    raise
            # which row it was, the function says when it gets them one by one
        formatted = []
        for row in rows:
            try:
                formatted += self._of_batch([row]) if self.takes_batches else [self._of_row(row)]
            except RowError as error:
                if on_error is None:
                    raise
                on_error(row, error)
        return formatted

    # ---- which kind it is ----------------------------------------------------------------------------------------

    def _settle(self, rows: Sequence[Row], may_skip: bool) -> bool:
        """`_wants_batches` of all rows or, where bad ones among them may be skipped, of the first that is good."""
        try:
            return self._wants_batches(rows)
        except RowError:
            for row in rows if may_skip else ():
                with suppress(RowError):
                    return self._wants_batches([row])
            raise

    def _wants_batches(self, rows: Sequence[Row]) -> bool:
        """Whether the function takes a dict of lists, from what it returns for a few rows and for one."""
        batch = as_batch(rows)
        of_batch, batch_error = self._called(batch)
        if batch_error is None and _is_result_of(of_batch, len(rows)) and not _treats_lists_as_values(of_batch, batch):
            return True
        row = rows[0].value
        of_row, row_error = self._called(dict(row))
        if row_error is None and as_example(of_row) is not None:
            texts = [item for item in row.values() if isinstance(item, str) and len(item) > 1]
            if all(_holds(of_row, text) or _lists(of_batch, text) for text in texts if _holds(of_batch, text)):
                return False
        if batch_error is None and of_batch in batch.values() and _is_result_of(of_batch, len(rows)):
            return True
        raise self._of_no_kind(rows, of_batch, batch_error, of_row, row_error)

    def _called(self, value: dict[str, Any]) -> tuple[Any, Exception | None]:
        try:
            return self.function(value), None
        except Exception as error:  # a person's function may raise anything
            return None, error

    def _of_no_kind(
        self,
        rows: Sequence[Row],
        of_batch: Any,
        batch_error: Exception | None,
        of_row: Any,
        row_error: Exception | None,
    ) -> DataError:
        first = rows[0]
        if batch_error is None and isinstance(of_batch, str):
            return DataError(
                f"{CONTRACT} {self.name} got {len(rows)} rows as a dict of lists and returned one text "
                f"({visible(repr(of_batch), 60)}). Return a list with one text per row, or write it for a single row: "
                "then its values are no lists."
            )
        batch_says = _words(batch_error) if batch_error is not None else _found(of_batch, len(rows))
        row_says = _words(row_error) if row_error is not None else f"it returned {kind_of(of_row)}"
        return RowError(
            f"{place(first.source, first.line)}: formatting_func {self.name} fits no rows: given {len(rows)} of them "
            f"as a dict of lists, {batch_says}; given one row, {row_says}. {CONTRACT} Or it takes one row and "
            f"returns its text. The columns are {columns_of(first.value)}.",
            FAILED,
            first.source,
            first.line,
        )

    # ---- calling it ----------------------------------------------------------------------------------------------

    def _of_batch(self, rows: Sequence[Row]) -> list[Row]:
        result, error = self._called(as_batch(rows))
        if error is not None:
            raise self._failed(rows[0], _words(error)) from error
        if not isinstance(result, list | tuple) or len(result) != len(rows):
            raise self._failed(rows[0], _found(result, len(rows)))
        return [self._row(row, item) for row, item in zip(rows, result)]

    def _of_row(self, row: Row) -> Row:
        result, error = self._called(dict(row.value))
        if error is not None:
            raise self._failed(row, _words(error)) from error
        return self._row(row, result)

    def _row(self, row: Row, result: Any) -> Row:
        example = as_example(result)
        if example is None:
            raise self._failed(row, f"it returned {kind_of(result)} for this row, neither a text nor turns")
        return row._replace(value=example)

    def _failed(self, row: Row, what: str) -> RowError:
        return RowError(
            f"{place(row.source, row.line)}: formatting_func {self.name}: {what}. The columns are "
            f"{columns_of(row.value)}. Mend the function or the row.",
            FAILED,
            row.source,
            row.line,
        )


def as_batch(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Rows as a dict of lists; a column that a row lacks is `None` there."""
    names = dict.fromkeys(name for row in rows for name in row.value)
    return {name: [row.value.get(name) for row in rows] for name in names}


def as_example(result: Any) -> dict[str, Any] | None:
    """What a function returned for one row as the row that it stands for, or None if it is none."""
    if isinstance(result, str):
        return {"text": result}
    if isinstance(result, Mapping):
        known = result.keys() & {"text", "messages", "conversations"} or {"prompt", "completion"} <= result.keys()
        columns = ("text", "messages", "conversations", "prompt", "completion")
        is_one = not any(_is_column(result.get(name)) for name in columns)
        return dict(result) if known and is_one else None
    is_turns = isinstance(result, list) and bool(result) and all(_is_turn(turn) for turn in result)
    return {"messages": result} if is_turns else None


def _is_column(value: Any) -> bool:
    """Values of several rows: texts, or lists of turns."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], str | list)


def _is_turn(turn: Any) -> bool:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role", turn.get("from")), str):
        return False
    content = turn.get("content", turn.get("value"))
    return not (isinstance(content, list) and any(isinstance(part, str) for part in content))


def _is_result_of(result: Any, num_rows: int) -> bool:
    is_list = isinstance(result, list | tuple) and len(result) == num_rows
    return is_list and all(as_example(item) is not None for item in result)


def _treats_lists_as_values(result: Sequence[Any], batch: Mapping[str, list[Any]]) -> bool:
    """Whether the function wrote a whole column into a text, or cut a column, as one for single rows would.

    `row["text"][:2000]` of a dict of lists is the first 2000 rows, a list of texts that nobody has cut.
    """
    columns = [str(column) for column in batch.values()]
    return result in batch.values() or any(
        column in item for item in result if isinstance(item, str) for column in columns
    )


# A function for single rows that gets a dict of lists writes lists, or values that it also writes for the one row. One
# for batches that returns a single text has taken the value of one row out of its list; for a single row that is but
# the first character.


def _holds(result: Any, text: str) -> bool:
    """Whether the text stands, whole, somewhere in the result."""
    if isinstance(result, str):
        return text in result
    items = result.values() if isinstance(result, Mapping) else result if isinstance(result, list | tuple) else ()
    return any(_holds(item, text) for item in items)


def _lists(result: Any, text: str) -> bool:
    """Whether the text stands there as the first of a list."""
    if isinstance(result, str):
        return f"[{text!r}" in result
    if isinstance(result, list | tuple):
        return text in result[:1] or any(_lists(item, text) for item in result)
    return isinstance(result, Mapping) and any(_lists(item, text) for item in result.values())


def _words(error: Exception | None) -> str:
    return f"it raised {visible(f'{type(error).__name__}: {error}', 120)}"


def _found(result: Any, num_rows: int) -> str:
    if isinstance(result, list | tuple) and len(result) != num_rows:
        return f"it returned {len(result)} items for {num_rows} rows"
    return f"it returned {kind_of(result)} for {num_rows} rows, not a list of texts"
