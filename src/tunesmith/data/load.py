"""A Hub id, a file or a folder becomes rows; each row knows the file and the line it came from.

The reading is our own: it accepts what is harmless (BOM, CRLF, blank lines) and names the line of everything else.
"""

import csv
import json
import math
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from tunesmith.data.report import Report, place, visible
from tunesmith.errors import ConfigError, DataError
from tunesmith.lookup import did_you_mean

T = TypeVar("T")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


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


def load_rows(
    source: str | Path | Sequence[str | Path],
    *,
    split: str = "train",
    max_samples: int | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    report: Report,
) -> list[Row]:
    """Read every row of a file, a folder of files, a Hub dataset, or a list of these, joined in order.

    Args:
        source: file (json, jsonl, csv, parquet, txt), folder of files of one type, Hub id `owner/name`, or a list.
        split: split of a Hub dataset; files have none.
        max_samples: at most this many good rows from each entry of `source`; a folder is one entry.
        on_bad_row: raise at the first row that cannot be read, or count it in `report` and go on.
        report: counts the rows read and those left out.

    Raises: DataError for a source that is absent, empty or not readable; RowError for a row, unless skipped.
    """
    rows: list[Row] = []
    for name in [source] if isinstance(source, (str, Path)) else source:
        items = _read_source(str(name), split, report)
        rows += islice(_good_rows(items, on_bad_row, report), max_samples)
    return rows


def _good_rows(items: Iterable[Row | RowError], on_bad_row: str, report: Report) -> Iterator[Row]:
    for item in items:
        if isinstance(item, RowError) and on_bad_row == "error":
            raise item
        report.read += 1
        if isinstance(item, RowError):
            report.dropped(item.reason, item, str(item))
        else:
            yield item


def _read_source(name: str, split: str, report: Report) -> Iterator[Row | RowError]:
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        for file in _folder_files(path, report):
            yield from _read_file(file)
    elif os.path.exists(path):
        yield from _read_file(path)
    elif _looks_like_hub_id(name):
        yield from _not_empty(_read_hub(name, split), name)
    else:
        raise DataError(_absent(name, path))


def _looks_like_hub_id(name: str) -> bool:
    """`owner/name`, unless it reads as a path: a known ending, or an owner that is a folder here."""
    owner = name.partition("/")[0]
    return bool(HUB_ID.fullmatch(name)) and Path(name).suffix.lower() not in READERS and not os.path.isdir(owner)


def _absent(name: str, path: str) -> str:
    parent, last = os.path.split(path)
    siblings = os.listdir(parent or ".") if os.path.isdir(parent or ".") else []
    hint = did_you_mean(last, [s for s in siblings if not s.startswith(".")])
    if not hint and parent and not os.path.isdir(parent):
        hint = f" There is no folder {visible(parent)} either."
    return f"{visible(name)} is neither a file nor a folder, nor a Hub id of the form owner/name.{hint}"


def _folder_files(folder: str, report: Report) -> list[str]:
    """The data files of a folder in name order; hidden files and subfolders are not looked at."""
    entries = sorted(e.name for e in os.scandir(folder) if e.is_file() and not e.name.startswith("."))
    files = [name for name in entries if Path(name).suffix.lower() in READERS]
    if not files:
        raise DataError(f"{folder} holds no data file. It must hold files ending in {', '.join(READERS)}.")
    ignored = [name for name in entries if name not in files]
    if ignored:
        report.note(f"{folder}: not read: {', '.join(map(visible, ignored[:5]))}{' ...' * (len(ignored) > 5)}")
    for name in files:
        if Path(name).suffix.lower() != Path(files[0]).suffix.lower():
            raise DataError(
                f"{folder} mixes types: {files[0]} and {name}. Move one of them away, or name the files one by one."
            )
    return [os.path.join(folder, name) for name in files]


def _read_file(path: str) -> Iterator[Row | RowError]:
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        known = ", ".join(READERS)
        raise DataError(f"{path}: cannot read a file that ends in '{suffix}'. Convert or unpack it to one of {known}.")
    try:
        yield from _not_empty(READERS[suffix](path), path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _not_empty(items: Iterable[T], name: str) -> Iterator[T]:
    count = 0
    for count, item in enumerate(items, 1):  # noqa: B007
        yield item
    if not count:
        raise DataError(f"{name} is empty: it holds no rows. Put at least one example into it.")


# Lines and characters --------------------------------------------------------------------------------------------


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Line numbers and lines. Only a line feed ends a line: U+2028 and the like may stand inside a text."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            yield number, _without_bom(path, raw) if number == 1 else raw


def _without_bom(path: str, raw: bytes) -> bytes:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16, not UTF-8. {_convert('UTF-16', path)}")
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
    what = f"not UTF-8: byte 0x{raw[error.start]:02X} at byte {error.start + 1} of the line" + (
        f", after '{before}'" if before else ""
    )
    return RowError(f"{what}. It decodes as {encoding}. {_convert(encoding, path)}", "not-utf-8")


def _likely_encoding(raw: bytes) -> str:
    """GBK writes a Chinese character as two bytes, so its high bytes come in runs; Latin-1's stand alone."""
    high_runs = re.findall(rb"[\x80-\xff]+", raw)
    in_pairs = sum(len(run) for run in high_runs if len(run) > 1)
    if 2 * in_pairs > sum(map(len, high_runs)):
        try:
            raw.decode("gb18030")
        except UnicodeDecodeError:
            return "LATIN1"
        return "GBK" if _decodes(raw, "gbk") else "GB18030"
    return "LATIN1"


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _convert(encoding: str, path: str) -> str:
    return f"Convert it with iconv -f {encoding} -t UTF-8 {visible(os.path.basename(path))}"


# JSON ------------------------------------------------------------------------------------------------------------


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


def read_jsonl(path: str) -> Iterator[Row | RowError]:
    """One JSON object per line; blank lines are skipped."""
    for number, raw in _lines(path):
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
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return "The line ends too early. Was the file cut off, or does an object go over several lines (see jq -c)?"
    if re.match(r"\s*\{\s*'", text):
        return "JSON wants double quotes; write the file with json.dumps, not with str."
    return 'Each line must be one JSON object, such as {"prompt": "...", "completion": "..."}.'


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


def read_json(path: str) -> Iterator[Row | RowError]:
    """A JSON array of objects; or, as many programs write `.json`, one object per line."""
    raw = _without_bom(path, Path(path).read_bytes())
    if not raw.lstrip().startswith(b"["):
        if raw.lstrip().startswith(b"{") and len(raw.lstrip().splitlines()[0].strip()) == 1:
            raise DataError(
                f"{path} is one JSON object over several lines; expected an array of rows, or one object per line. "
                f"If the rows stand under a key, take them out: jq .KEY {visible(os.path.basename(path))}"
            )
        yield from read_jsonl(path)
        return
    text = "\n".join(_decode(line, path, number) for number, line in enumerate(raw.split(b"\n"), 1))
    yield from _array_rows(path, text)


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


# CSV, text, parquet, Hub -------------------------------------------------------------------------------------------


class _TextLines:
    """Decoded lines for the csv module. An iterator class, because a generator would end at its first bad line."""

    def __init__(self, path: str):
        self.path, self.lines, self.number = path, _lines(path), 0

    def __iter__(self) -> "_TextLines":
        return self

    def __next__(self) -> str:
        self.number, raw = next(self.lines)
        return _decode(raw, self.path, self.number)


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


def _header(path: str, reader: Iterator[list[str]], lines: _TextLines) -> list[str]:
    header = next((fields for fields in reader if fields), [])
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
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(value, path, number)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        what = visible(str(error), 120).rstrip(".")
        raise DataError(
            f"{path}: not readable as Parquet after row {number}: {what}. Write the file again."
        ) from error


def _read_hub(name: str, split: str) -> Iterator[Row]:
    try:
        import datasets

        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library's errors share no base; every one means the dataset cannot be had
        what = visible(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__, 200)
        raise DataError(
            f"dataset '{name}' is no file or folder here and could not be loaded from the Hub (split '{split}'): "
            f"{what}. Check the name, the split and the network, or name a local file."
        ) from error
    for number, value in enumerate(dataset, 1):
        yield Row(value, name, number)


READERS: dict[str, Callable[[str], Iterator[Row | RowError]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_txt,
}


# Held-out rows -----------------------------------------------------------------------------------------------------


def split_rows(rows: Sequence[T], val_size: float, seed: int) -> tuple[list[T], list[T]]:
    """Hold out a share (`val_size` < 1, at least one row) or a count (≥ 1): rows to train on, rows held out.

    The draw depends on `seed` and the number of rows alone; both parts keep the order of `rows`.

    Raises: DataError when nothing would be left to train on; ConfigError when a count is not whole.
    """
    if val_size < 0 or (val_size >= 1 and val_size != int(val_size)):
        raise ConfigError(f"val_size: expected a share below 1 or a whole number of rows, got {val_size}.")
    if val_size == 0:
        return list(rows), []
    num_held_out = int(val_size) if val_size >= 1 else max(1, round(val_size * len(rows)))
    if num_held_out >= len(rows):
        raise DataError(
            f"val_size: {val_size} holds out {num_held_out} of {len(rows)} rows, so none is left to train on. "
            "Lower it, or name held-out files with eval_dataset."
        )
    held_out = set(random.Random(seed).sample(range(len(rows)), num_held_out))
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [rows[index] for index in sorted(held_out)]
