"""Tokenized data kept on disk: the same rows, tokenizer, template and options are tokenized once, by one process.

    <folder>/<key>/tokens.arrow   the token rows, read through memory mapping
    <folder>/<key>/entry.json     checksum of the rows, and the report of the run that made them

The key is a hash of everything that the tokens depend on, this package's own code included, so an entry is never
stale; one that was damaged is found by its checksum and made anew. An entry is written beside its place and renamed:
it is there as a whole or not at all. Whenever one is written, those unused for 30 days are removed, and above 20 GiB
in all the longest unused.
"""

import contextlib
import copy
import functools
import hashlib
import inspect
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
import xxhash
from filelock import FileLock, Timeout

from tunesmith.data.pack import dataset_of
from tunesmith.data.report import Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MIN_ROWS = 2000  # fewer are tokenized in about a second, which reading the cache would not beat by much
MAX_BYTES = 20 << 30
MAX_AGE = 30 * 86400.0  # seconds without use
OFF = "off"
TOKENS, ENTRY = "tokens.arrow", "entry.json"
KEY = re.compile(r"[0-9a-f]{32}")


# What tokens depend on ---------------------------------------------------------------------------------------------


def key_of(
    examples: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase", options: Mapping[str, Any]
) -> str | None:
    """The key of what is made of these examples, with their sources and lines, by this tokenizer with these options.

    Returns: `None` where something cannot be hashed by content: a function, a slow tokenizer, an object in a row.
    """
    tokenizer_state = _state_of(tokenizer)
    if tokenizer_state is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    try:
        for part in ([_code(), tokenizer_state, dict(options)], *_slices(examples)):
            digest.update(json.dumps(part, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    except (TypeError, ValueError, RecursionError):
        return None
    return digest.hexdigest()


def _slices(examples: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[Mapping[str, Any]]]:
    """A thousand examples at a time: one call for each example would take twice as long."""
    return (examples[begin : begin + 1000] for begin in range(0, len(examples), 1000))


@functools.cache
def _code() -> list[str]:
    """This package's own code, and the versions of what it calls to render and tokenize."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return [digest.hexdigest(), *map(metadata.version, ("transformers", "tokenizers", "jinja2"))]


def _state_of(tokenizer: "PreTrainedTokenizerBase") -> list[Any] | None:
    """All that a tokenizer's results depend on: class, backend, special tokens, template, the date if it writes it."""
    kind = type(tokenizer)
    if not tokenizer.is_fast:
        return None
    code = ""
    if not kind.__module__.startswith("transformers."):  # a class of somebody's own, which may have changed
        try:
            code = Path(inspect.getfile(kind)).read_text(encoding="utf-8")
        except (OSError, TypeError):
            return None
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()  # what the last call left behind
    backend.no_padding()
    template = json.dumps(tokenizer.chat_template)
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    today = date.today().isoformat() if "strftime_now" in template else ""
    return [f"{kind.__module__}.{kind.__qualname__}", code, backend.to_str(), special, template, today]


# Entries -----------------------------------------------------------------------------------------------------------


def cache_of(data_cache_dir: str | None, overwrite: bool = False) -> "Cache | None":
    """The cache that `data_cache_dir` names.

    `None`: `$TUNESMITH_CACHE/data`, else `tunesmith/data` in the user's cache folder; "off", there too: none.
    """
    folder = data_cache_dir or os.environ.get("TUNESMITH_CACHE")
    if folder == OFF:
        return None
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunesmith"
    return Cache(Path(folder) if data_cache_dir else Path(folder) / "data", overwrite)


class Damaged(Exception):
    """An entry is not what was written."""


@dataclass(frozen=True)
class Cache:
    """A folder of entries, shared by any number of processes."""

    folder: Path
    overwrite: bool = False
    """Make anew what is there."""
    min_rows: int = MIN_ROWS
    """Sets of fewer rows are not kept."""

    def fetch(
        self, key: str | None, build: Callable[[Report], datasets.Dataset], report: Report, num_rows: int
    ) -> datasets.Dataset:
        """The dataset of this key: read, or built and kept. While one process builds it, others wait and then read.

        Args:
            build: makes the dataset and counts what became of its rows.
            report: gets those counts, from the entry if it is read, and a note on where the tokens came from.
            num_rows: rows that go in.
        """
        if key is None or num_rows < self.min_rows:
            return build(report)
        since, path = time.time(), self.folder / key
        with contextlib.ExitStack() as held:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(_locked(self.folder / f"{key[:2]}.lock"))  # few files for any number of keys
            except (OSError, NotImplementedError) as error:
                report.note(f"tokens are not kept, data_cache_dir cannot be used: {_why(error)}")
                return build(report)
            try:
                found = self._found(path, since)
            except Damaged as error:
                found = None
                report.note(f"the kept tokens of these rows are damaged ({error}) and are made anew")
            if found is not None:
                report.add(found[1])
                report.note(f"tokens read from the cache (key {key[:8]})")
                return found[0]
            part = Report()
            dataset = build(part)
            report.add(part)
            try:
                self._write(path, dataset, part)
                return _read(path)[0]
            except (OSError, Damaged) as error:
                report.note(f"tokens are not kept, data_cache_dir cannot be written: {_why(error)}")
                return dataset

    def _found(self, path: Path, since: float) -> tuple[datasets.Dataset, Report] | None:
        """The entry, unless there is none, or it is to be overwritten and no other process has done so meanwhile."""
        if not path.exists():
            return None
        if self.overwrite:
            with contextlib.suppress(Damaged):
                return _read(path) if _entry(path)["written"] >= since else None
            return None
        found = _read(path)
        with contextlib.suppress(OSError):  # another's folder, perhaps; the time only says what to remove first
            os.utime(path / ENTRY)
        return found

    def _write(self, path: Path, dataset: datasets.Dataset, part: Report) -> None:
        """Put an entry in its place, and make room."""
        beside = self.folder / f".{path.name}.{os.getpid()}-{time.time_ns()}"
        try:
            beside.mkdir()
            table = dataset.with_format("arrow")[:]
            with pa.OSFile(str(beside / TOKENS), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
            entry = {"written": time.time(), "tokens": _checksum(beside / TOKENS), "report": part.state()}
            text = json.dumps(entry, ensure_ascii=False)
            check = xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
            (beside / ENTRY).write_text(f"{check}\n{text}", encoding="utf-8", errors="surrogatepass")
            if path.exists():
                shutil.rmtree(path)
            beside.rename(path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        self._prune(path)

    def _prune(self, new: Path) -> None:
        """Remove what a killed process left, what was long unused, and above the limit what was longest unused."""
        total, now = 0, time.time()
        for used, size, path in sorted(self._entries(), reverse=True):
            total += size
            is_left = path.name.startswith(".") and now - used > 86400
            if path != new and (is_left or now - used > MAX_AGE or total > MAX_BYTES):
                total -= size
                shutil.rmtree(path, ignore_errors=True)

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, bytes and folder of each entry, and of those that were never finished."""
        for path in self.folder.iterdir():
            if KEY.fullmatch(path.name) or re.fullmatch(rf"\.{KEY.pattern}\..*", path.name):
                with contextlib.suppress(OSError):  # another process may be removing it
                    files = [file.stat() for file in path.iterdir()]
                    used = max([file.st_mtime for file in files], default=path.stat().st_mtime)
                    yield used, sum(file.st_size for file in files), path


def _read(path: Path) -> tuple[datasets.Dataset, Report]:
    """The tokens of an entry, mapped from the file, and what became of the rows they were made of.

    Raises: Damaged.
    """
    entry = _entry(path)
    try:
        if _checksum(path / TOKENS) != entry["tokens"]:
            raise Damaged(f"{TOKENS} does not match its checksum")
        table = pa.ipc.open_stream(pa.memory_map(str(path / TOKENS))).read_all()
        # to `datasets` a table in memory, so that it writes no caches of its own beside it
        return dataset_of(table, fingerprint=path.name), Report.of(entry["report"])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise Damaged(_why(error)) from error


def _entry(path: Path) -> dict[str, Any]:
    try:
        check, _, text = (path / ENTRY).read_text(encoding="utf-8", errors="surrogatepass").partition("\n")
    except (OSError, ValueError) as error:
        raise Damaged(_why(error)) from error
    if check != xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass")):
        raise Damaged(f"{ENTRY} does not match its checksum")
    return json.loads(text)


def _checksum(path: Path) -> list[Any]:
    """Size and hash of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return [path.stat().st_size, digest.hexdigest()]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of that name; the system lets go of it when a process dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=10)
    except Timeout:
        logger.warning("waiting for another process that tokenizes the same data")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _why(error: Exception) -> str:
    """What went wrong, without the path."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
