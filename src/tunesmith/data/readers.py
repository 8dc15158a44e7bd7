"""A file of any known type becomes rows, each with its line; in place of a row that cannot be read, a RowError.

The reading is our own: it accepts what is harmless (BOM, CRLF, blank lines) and names the line of everything else.
"""

import csv
import json
import math
import os
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tunesmith.data.report import place, visible
from tunesmith.data.rows import Row, RowError, without_nulls
from tunesmith.errors import DataError

PART = 2**20  # characters of a JSON array that are read at once

# JSON ------------------------------------------------------------------------------------------------------------


def read_jsonl(path: str, after: int = 0) -> Iterator[Row | RowError]:
    """One JSON object per line, from the line after `after`; blank lines are skipped."""
    for number, raw in islice(_lines(path), after, None):
        if not raw.isspace() and raw:
            yield _json_row(path, number, raw.rstrip(b"\r\n"))


def _json_row(path: str, line: int, raw: bytes) -> Row | RowError:
    try:
        text = _decode(raw, path, line)
    except RowError as error:
        return error
    try:
        return Row(_object(STRICT.decode(text), SUSPICIOUS_ESCAPE.search(text) is not None), path, line)
    except RowError as error:
        if error.reason == "not-an-object" and text.lstrip().startswith("[") and path.lower().endswith(".jsonl"):
            error = RowError(f"{error} A file that is one JSON array must be named .json.", error.reason)
        return error.at_line(path, line)
    except json.JSONDecodeError as error:
        return RowError(f"{_syntax(error)}. {_line_hint(text, error)}", "bad-json").at_line(path, line)
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        return RowError(f"not readable as JSON: {visible(str(error), 60)}. Simplify it.", "bad-json").at_line(
            path, line
        )


def _syntax(error: json.JSONDecodeError) -> str:
    start = max(0, error.pos - 30)
    excerpt = visible(error.doc[start : error.pos + 30].strip(), 60)
    return f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}: '{excerpt}'"


def _line_hint(text: str, error: json.JSONDecodeError) -> str:
    if text.strip() in ("{", "["):
        return (
            "One object per line is expected and this file's go over several: convert it with jq -c, or name it .json."
        )
    if text.lstrip().startswith("["):
        return "A file that is one JSON array must be named .json."
    if error.msg == "Extra data" and text[error.pos :].strip() == ",":
        return (
            "Take the commas between the rows out (sed 's/,$//'); only the rows of a JSON array, in .json, have them."
        )
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return "The line ends too early. Was the file cut off, or does an object go over several lines (see jq -c)?"
    if re.match(r"\s*\{\s*'", text):
        return "JSON wants double quotes; write the file with json.dumps, not with str."
    return 'Each line must be one JSON object, such as {"prompt": "...", "completion": "..."}.'


def read_json(path: str) -> Iterator[Row | RowError]:
    """A JSON array of objects, a part of it in memory; or, as many programs write `.json`, one object per line."""
    with open(path, "rb") as file:
        start = _without_bom(path, file.read(PART)).lstrip()
    if start.startswith(b"["):
        yield from _array_parts(path)
        return
    if start.startswith(b"{") and len(start.splitlines()[0].strip()) == 1:
        raise DataError(
            f"{path} is one JSON object over several lines; expected an array of rows, or one object per line. "
            f"If the rows stand under a key, take them out: jq .KEY {visible(os.path.basename(path))}"
        )
    yield from read_jsonl(path)


def _array_parts(path: str) -> Iterator[Row | RowError]:
    """The elements of an array. At the first that is not whole and good, the whole file is read to say why."""
    number, is_good = 0, False
    with open(path, encoding="utf-8-sig", newline="") as file, suppress(UnicodeDecodeError):
        number, is_good = yield from _whole_elements(path, file)
    if not is_good:
        text = _decode_file(_without_bom(path, Path(path).read_bytes()), path)
        yield from islice(_array_rows(path, text), number, None)


def _whole_elements(path: str, file: TextIO) -> Generator[Row | RowError, None, tuple[int, bool]]:
    """Elements as they come; returns how many there were, and whether the array ended as it should."""
    number, text = 0, file.read(PART)
    begin = text.index("[") + 1
    while True:
        found = _whole_element(path, text, begin, number + 1)
        if found is None:  # cut off by the end of the part, or broken
            part = file.read(max(PART, len(text) - begin))
            if not part:
                return number, False
            text, begin = text[begin:] + part, 0
            continue
        row, begin, closed = found
        number += 1
        yield row
        if closed:
            return number, not (text[begin:] + file.read()).strip(" \t\r\n")


def _whole_element(path: str, text: str, begin: int, number: int) -> tuple[Row | RowError, int, bool] | None:
    """The next element, where the one after it begins, and whether it was the last; None if it is not all there."""
    begin, refused = BLANK.match(text, begin).end(), None
    try:
        try:
            value, end = STRICT.raw_decode(text, begin)
        except RowError as error:
            value, end = LENIENT.raw_decode(text, begin)
            refused = error
    except (ValueError, RecursionError):
        return None
    separator = SEPARATOR.match(text, end)
    if separator is None:
        return None
    try:
        value = _object(value, SUSPICIOUS_ESCAPE.search(text, begin, end) is not None)
    except RowError as error:
        refused = refused or error
    row = Row(value, path, number) if refused is None else refused.at(path, number)
    return row, separator.end(), separator[1] == "]"


def _decode_file(raw: bytes, path: str) -> str:
    """The text of a whole file. Only if something is wrong with it is it taken line by line, to name the line."""
    if b"\0" not in raw:
        with suppress(UnicodeDecodeError):
            return raw.decode("utf-8")
    return "\n".join(_decode(line, path, number) for number, line in enumerate(raw.split(b"\n"), 1))


def _array_rows(path: str, text: str) -> Iterator[Row | RowError]:
    """Elements one by one, so that each has a number. After a syntax error nothing more can be found: it is raised."""
    suspicious = SUSPICIOUS_ESCAPE.search(text) is not None
    number, end = 0, BLANK.match(text, text.index("[") + 1).end()
    closed = text[end : end + 1] == "]"
    end += closed
    while not closed:
        number += 1
        item, end = _element(path, text, end, number, suspicious)
        yield item
        separator = SEPARATOR.match(text, end)
        if separator is None:
            raise _array_error(path, json.JSONDecodeError("Expecting ',' or ']'", text, end), number)
        end, closed = separator.end(), separator[1] == "]"
    end = BLANK.match(text, end).end()
    if end < len(text):
        raise _array_error(path, json.JSONDecodeError("Extra data after the array", text, end), number)


def _element(path: str, text: str, start: int, number: int, suspicious: bool) -> tuple[Row | RowError, int]:
    """One element of the array and where it ends."""
    try:
        try:
            value, end = STRICT.raw_decode(text, start)
            return Row(_object(value, suspicious), path, number), end
        except RowError as error:  # well-formed but refused: its end is found without the hooks
            return error.at(path, number), LENIENT.raw_decode(text, start)[1]
    except json.JSONDecodeError as error:
        raise _array_error(path, error, number) from None
    except (RecursionError, ValueError) as error:
        what = f"not readable as JSON: {visible(str(error), 60)}. Simplify it."
        raise RowError(what, "bad-json").at(path, number) from None


def _array_error(path: str, error: json.JSONDecodeError, number: int) -> RowError:
    hint = (
        "Was the file cut off while it was written?"
        if error.pos >= len(error.doc.rstrip())
        else "Mend the file there."
    )
    return RowError(f"{path}:{error.lineno}: {_syntax(error)} (row {number}). {hint}", "bad-json", path, number)


# Values of JSON ----------------------------------------------------------------------------------------------------


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RowError(
            f"the key '{visible(twice, 40)}' is given twice in one object. Keep one of them.", "duplicate-key"
        )
    return value


def _no_constant(name: str) -> float:
    raise RowError(f"{name} is not JSON. Write null or a number, or leave the row out.", "not-finite")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise RowError(f"the number {visible(digits, 20)} is too large. Write one that a float holds.", "not-finite")
    return value


STRICT = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)
LENIENT = json.JSONDecoder()
SUSPICIOUS_ESCAPE = re.compile(r"\\u(?:[dD][89a-fA-F]|0000)")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
SEPARATOR = re.compile(r"[ \t\n\r]*([,\]])[ \t\n\r]*")
BLANK = re.compile(r"[ \t\n\r]*")


def _object(value: Any, suspicious: bool) -> dict[str, Any]:
    """`value` if it is an object whose strings can be written as UTF-8; `suspicious` texts are looked through."""
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}.get(
            type(value), "a number"
        )
        raise RowError(f"the row is {kind}, not an object. Write {{column: value, ...}}.", "not-an-object")
    for text in _strings(value) if suspicious else ():
        if found := LONE_SURROGATE.search(text):
            escape = f"\\u{ord(found[0]):04x}"
            what = f"lone surrogate {escape} in '{visible(text, 40)}': half of a character"
            raise RowError(f"{what}. Write the whole character, or remove the half.", "lone-surrogate")
        if "\0" in text:
            raise RowError(f"NUL character in '{visible(text, 40)}'. Remove it; text has none.", "nul-byte")
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


# CSV, text, parquet ------------------------------------------------------------------------------------------------


def read_csv(path: str) -> Iterator[Row | RowError]:
    """Comma-separated values under a header; every value is a string."""
    limit = csv.field_size_limit(2**31 - 1)  # the module's own limit, 131,072 characters, is less than a long document
    try:
        lines = _TextLines(path)
        reader = csv.reader(lines, strict=True)
        header = _header(path, reader, lines)
        while True:
            line = lines.number + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except RowError as error:
                yield error
            except csv.Error as error:
                yield RowError(f"not valid CSV: {error}. Double the quotes inside a field.", "bad-csv").at(path, line)
            else:
                if fields:
                    yield _csv_row(path, line, header, fields)
    finally:
        csv.field_size_limit(limit)


class _TextLines:
    """Decoded lines for the csv module. An iterator class, because a generator would end at its first bad line."""

    def __init__(self, path: str):
        self.path, self.lines, self.number = path, _lines(path), 0

    def __iter__(self) -> "_TextLines":
        return self

    def __next__(self) -> str:
        self.number, raw = next(self.lines)
        return _decode(raw, self.path, self.number)


def _header(path: str, reader: Iterator[list[str]], lines: _TextLines) -> list[str]:
    try:
        header = next((fields for fields in reader if fields), [])
    except csv.Error as error:
        at = place(path, lines.number)
        raise DataError(f"{at}: not valid CSV: {error}. Double the quotes inside a field.") from None
    at = place(path, lines.number)
    if len(header) == 1 and (found := re.search(r"[;\t|]", header[0])):
        raise DataError(f"{at}: the columns are separated by {visible(found[0])!r}; write the file with commas.")
    for number, name in enumerate(header, 1):
        if not name.strip():
            raise DataError(f"{at}: column {number} of the header has no name. Name it, or remove the column.")
        if name in header[: number - 1]:
            raise DataError(f"{at}: the header names column '{visible(name, 40)}' twice. Rename one of them.")
    return header


def _csv_row(path: str, line: int, header: list[str], fields: list[str]) -> Row | RowError:
    if len(fields) != len(header):
        what = f"{len(fields)} fields where the header has {len(header)} ({visible(', '.join(header), 60)})"
        return RowError(f"{what}. Put fields that hold a comma in double quotes.", "ragged-row").at(path, line)
    return Row(dict(zip(header, fields)), path, line)


def read_txt(path: str) -> Iterator[Row | RowError]:
    """One row per line; lines of white space are skipped."""
    for number, raw in _lines(path):
        try:
            text = _decode(raw, path, number).removesuffix("\n").removesuffix("\r")
        except RowError as error:
            yield error
        else:
            if text.strip():
                yield Row({"text": text}, path, number)


def read_parquet(path: str) -> Iterator[Row | RowError]:
    """Rows of a Parquet file, read a batch at a time."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024):
                for value in _batch_values(batch):
                    number += 1
                    yield Row(without_nulls(value), path, number)
    except (pyarrow.ArrowException, UnicodeDecodeError, OverflowError) as error:
        what = visible(str(error), 120).rstrip(".")
        raise DataError(
            f"{path}: not readable as Parquet after row {number}: {what}. Write the file again."
        ) from error


def read_arrow(path: str) -> Iterator[Row | RowError]:
    """Rows of an Arrow file as `datasets` writes it (a stream), or in Arrow's file format; a batch at a time."""
    import pyarrow
    import pyarrow.ipc

    number = 0
    try:
        with pyarrow.OSFile(path) as file:
            is_file_format = file.read(6) == b"ARROW1"
            file.seek(0)
            for batch in _arrow_batches(pyarrow.ipc, file, is_file_format):
                _check_names(path, batch.schema.names)
                for value in _batch_values(batch):
                    number += 1
                    yield Row(without_nulls(value), path, number)
    except (pyarrow.ArrowException, UnicodeDecodeError, OverflowError) as error:
        what = visible(str(error), 120).rstrip(".")
        raise DataError(f"{path}: not readable as Arrow after row {number}: {what}. Write the file again.") from error


def _arrow_batches(ipc: Any, file: Any, is_file_format: bool) -> Iterator[Any]:
    if not is_file_format:
        yield from ipc.open_stream(file)
        return
    reader = ipc.open_file(file)
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def _check_names(path: str, names: list[str]) -> None:
    """Refuse two columns of one name: a row would hold the second alone."""
    for number, name in enumerate(names):
        if name in names[:number]:
            raise DataError(f"{path}: two columns are named '{visible(name, 40)}'. Rename one of them.")


def _batch_values(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch; times that Python cannot hold, beyond the year 9999, as the numbers that they are."""
    try:
        return batch.to_pylist()
    except (OverflowError, ValueError):
        import pyarrow as pa

        numbers = {32: pa.int32(), 64: pa.int64()}
        columns = [
            column.view(numbers[column.type.bit_width]) if pa.types.is_temporal(column.type) else column
            for column in batch.columns
        ]
        return pa.RecordBatch.from_arrays(columns, names=batch.schema.names).to_pylist()


READERS: dict[str, Callable[[str], Iterator[Row | RowError]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_txt,
}


# Lines and characters --------------------------------------------------------------------------------------------


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Line numbers and lines. Only a line feed ends a line: U+2028 and the like may stand inside a text.

    In a file that has none carriage returns do, as on old Macs.
    """
    with open(path, "rb", PART) as file:
        start = file.peek()
        lines = _carriage_lines(path) if b"\r" in start.rstrip(b"\r") and b"\n" not in start else file
        for number, raw in enumerate(lines, 1):
            yield number, _without_bom(path, raw) if number == 1 else raw


def _carriage_lines(path: str) -> Iterator[bytes]:
    with open(path, encoding="latin-1", newline="\r") as file:  # which holds every byte
        for line in file:
            yield line.removesuffix("\r").encode("latin-1") + b"\n"


PACKED = {b"\x1f\x8b": "gzip -dc", b"(\xb5/\xfd": "zstd -dc", b"PK\x03\x04": "funzip"}  # first bytes → unpacks


def _without_bom(path: str, raw: bytes) -> bytes:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16, not UTF-8. {_convert('UTF-16', path)}")
    for begin, command in PACKED.items():
        if raw.startswith(begin):
            name = visible(os.path.basename(path))
            raise DataError(
                f"{path} is packed ({command.split()[0]}). Unpack it: {command} < {name} > unpacked-{name}"
            )
    return raw.removeprefix(b"\xef\xbb\xbf")


def _decode(raw: bytes, path: str, line: int) -> str:
    """The text of one line; RowError with its place if it holds a NUL byte or is not UTF-8."""
    if b"\0" in raw:
        column = raw.index(b"\0") + 1
        hint = _convert("UTF-16", path) if raw.count(b"\0") > len(raw) // 4 else "Remove it; text has none."
        raise RowError(f"NUL byte at byte {column} of the line. {hint}", "nul-byte").at_line(path, line)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(raw, error, path).at_line(path, line) from None


def _not_utf8(raw: bytes, error: UnicodeDecodeError, path: str) -> RowError:
    encoding = _likely_encoding(raw)
    before = visible(raw[max(0, error.start - 30) : error.start].decode("utf-8", "replace"), 30)
    after = f", after '{before}'" if before else ""
    what = f"not UTF-8: byte 0x{raw[error.start]:02X} at byte {error.start + 1} of the line{after}"
    return RowError(f"{what}. It decodes as {encoding}. {_convert(encoding, path)}", "not-utf-8")


def _likely_encoding(raw: bytes) -> str:
    """GBK writes a Chinese character as two bytes, so its high bytes come in runs; Latin-1's stand alone."""
    high_runs = re.findall(rb"[\x80-\xff]+", raw)
    in_pairs = sum(len(run) for run in high_runs if len(run) > 1)
    if 2 * in_pairs > sum(map(len, high_runs)):
        return next((name for name in ("GBK", "GB18030") if _decodes(raw, name)), "LATIN1")
    return "LATIN1"


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _convert(encoding: str, path: str) -> str:
    return f"Convert it with iconv -f {encoding} -t UTF-8 {visible(os.path.basename(path))}"
