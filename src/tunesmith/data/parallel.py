"""Batches of examples → tables of token rows, in their order: by two threads, or by worker processes."""

import os
import signal
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.data.encode import Encoding, encode_batch, labelled_rows, rendered_rows
from tunesmith.data.normalize import Example
from tunesmith.data.render import Rendered
from tunesmith.data.report import Report
from tunesmith.data.rows import RowError
from tunesmith.data.tokenize import encode_straight, encoder_of, token_table
from tunesmith.errors import TemplateError

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

MIN_ROWS_OF_WORKERS, ROWS_OF_A_WORKER, MIN_CORES_OF_WORKERS, MAX_WORKERS = 50_000, 10_000, 4, 8
PARTS_AHEAD = 2
CHARACTERS_OF_A_PART = 4_000_000


class EncodedRows(NamedTuple):
    """What became of a batch, or of a part of one."""

    examples: Sequence[Example]
    """The batch."""
    indexes: list[int]
    """Which of them each row was made of."""
    table: "pa.Table"
    """The token rows."""


def encode_batches(
    batches: Iterable[Sequence[Example]],
    tokenizer: "PreTrainedTokenizerBase",
    how: Encoding,
    report: Report,
    num_proc: int | None = None,
) -> Iterator[EncodedRows]:
    """`encode_batch` of each batch, in their order and with the same result for every number of processes.

    Args:
        batches: read a few ahead of what is taken, never all at once.
        num_proc: worker processes; `None` or 1: this one, where a second thread encodes while the first renders.
    """
    if num_proc is None or num_proc < 2:
        yield from _with_a_thread(batches, tokenizer, how, report)
        return
    waiting: deque[tuple[Sequence[Example], Future]] = deque()
    is_of_script = type(tokenizer).__module__ == "__main__"  # which workers must then import
    context = SpawnContext() if is_of_script else _WorkerContext()
    with ProcessPoolExecutor(num_proc, context, _start_worker, (tokenizer, how)) as pool:
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(_work, batch)))
                if len(waiting) > 2 * num_proc:
                    yield _result(*waiting.popleft(), report)
            while waiting:
                yield _result(*waiting.popleft(), report)
        finally:
            pool.shutdown(cancel_futures=True)


def num_workers(num_proc: int | None, num_rows: int, tokenizer: "PreTrainedTokenizerBase", how: Encoding) -> int:
    """Processes for so many rows: as asked, or a few where rows and cores are many enough to pay for their start.

    Each takes some two seconds to import its libraries. One process alone keeps about two cores busy.
    """
    if num_proc is not None:
        return num_proc
    is_known = type(tokenizer).__module__.startswith("transformers.") and how.label_with is None
    if num_rows < MIN_ROWS_OF_WORKERS or not is_known:  # else a worker may not find what it needs
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(share, MAX_WORKERS, num_rows // ROWS_OF_A_WORKER) if share >= MIN_CORES_OF_WORKERS else 1


class _Part(NamedTuple):
    """Rendered rows of a batch whose texts another thread encodes."""

    examples: Sequence[Example]
    rows: list[tuple[int, Rendered]]
    straight: Future
    report: Report


def _with_a_thread(
    batches: Iterable[Sequence[Example]], tokenizer: "PreTrainedTokenizerBase", how: Encoding, report: Report
) -> Iterator[EncodedRows]:
    encoder = encoder_of(tokenizer) if tokenizer.is_fast else None
    waiting: deque[_Part] = deque()

    def finish() -> EncodedRows:
        part = waiting.popleft()
        kept = labelled_rows(part.examples, part.rows, part.straight.result(), tokenizer, how, part.report)
        report.add(part.report)
        return EncodedRows(part.examples, [index for index, _ in kept], token_table([tokens for _, tokens in kept]))

    with ThreadPoolExecutor(1, "tokenize") as thread:
        for batch in batches:
            counts = Report()
            try:
                rendered = rendered_rows(batch, tokenizer, how, counts)
            except (RowError, TemplateError):
                while waiting:  # an earlier row's error comes first
                    finish()
                raise
            for rows in _parted(rendered):
                texts = thread.submit(encode_straight, [row for _, row in rows], encoder)
                waiting.append(_Part(batch, rows, texts, counts))
                counts = Report()
                if len(waiting) > PARTS_AHEAD:
                    yield finish()
        while waiting:
            yield finish()


def _parted(rows: list[tuple[int, Rendered]]) -> Iterator[list[tuple[int, Rendered]]]:
    """The rows in parts of so many characters; one part, at least. An encoded text takes 100 bytes for each token."""
    part, size = [], 0
    for row in rows:
        part.append(row)
        size += len(row[1].text)
        if size >= CHARACTERS_OF_A_PART:
            yield part
            part, size = [], 0
    yield part


def _result(batch: Sequence[Example], future: Future, report: Report) -> EncodedRows:
    indexes, table, part = future.result()
    report.add(part)
    return EncodedRows(batch, indexes, table)


_OF_WORKER: dict[str, Any] = {}  # filled in worker processes only


def _start_worker(tokenizer: "PreTrainedTokenizerBase", how: Encoding) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the process that waits for them ends them
    _OF_WORKER.update(tokenizer=tokenizer, how=how)


def _work(batch: Sequence[Example]) -> "tuple[list[int], pa.Table, Report]":
    part = Report()
    kept = encode_batch(batch, _OF_WORKER["tokenizer"], _OF_WORKER["how"], part)
    return [index for index, _ in kept], token_table([tokens for _, tokens in kept]), part


class _Worker(SpawnProcess):
    """A spawned process that does not import the person's script.

    Python would import it to find what the script defines, and so run again what stands outside of
    `if __name__ == "__main__"`: loading the model, and starting workers. Nothing of the script is needed here.
    """

    @staticmethod
    def _Popen(process: BaseProcess) -> Any:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            return SpawnProcess._Popen(process)
        finally:
            sys.modules["__main__"] = main


class _WorkerContext(SpawnContext):
    Process = _Worker
