"""The data options become a stream of examples: read, mixed and shuffled while training asks for them.

sources ─ read ─► examples that are not held out ─ mix ─► one stream ─ shuffle in a buffer ─► train

No more than the buffer is held. A pass depends on the seed and the epoch alone, so it can be repeated and taken up.
"""

import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.iterable_dataset import ExamplesIterable

from tunesmith.config import DataConfig
from tunesmith.data.collect import STOPS, collect, mixture_weights, set_names, sources_of
from tunesmith.data.mix import Cursor, mix_streams, shuffled_stream
from tunesmith.data.normalize import Example
from tunesmith.data.registry import Source
from tunesmith.data.report import Report, place
from tunesmith.data.sources import Reading, check_source, source_examples
from tunesmith.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

LISTED = 1000  # dropped rows of each source that the report names
FINISHED = "tunesmith.data.stream:finished"
Key = tuple[int, int]  # source, number of its example


@dataclass
class Streamed:
    """A stream to train on, and what is held out of it."""

    train: "ExampleStream"
    evaluation: dict[str, list[Example]]
    """By name of the set; one set alone has the name `""`."""
    evaluation_reports: dict[str, Report]

    @property
    def report(self) -> Report:
        """What was read so far, in this process: every row once, however often it is passed; grows with training."""
        return self.train.passes.report()


def stream(options: DataConfig, *, stage: str = "sft", text_field: str = "text", seed: int = 42) -> Streamed:
    """Begin the stream of `dataset`; read what is held out.

    `val_size` is a count: the first so many examples of the shuffled stream. They are left out of every pass, whatever
    its order. `eval_dataset` is read whole.

    Args:
        options, stage, text_field, seed: as in `collect`; `buffer_size` examples are shuffled together.

    Raises: as `collect`; ConfigError for a share as `val_size`, DataError where nothing is left to train on.
    """
    if not options.dataset:
        raise ConfigError("dataset is missing. Name it: a file, a folder, a Hub id, or a name in dataset_info.json.")
    if options.eval_dataset and options.val_size:
        raise ConfigError("eval_dataset and val_size both say what is held out. Keep one.")
    if options.val_size != int(options.val_size):
        raise ConfigError(
            f"val_size: {options.val_size} of a stream cannot be known before its end. Give a number of rows, such as "
            "val_size: 100, or name held-out files with eval_dataset."
        )
    passes = Passes(options, stage, text_field, seed)
    evaluation = passes.hold_out(int(options.val_size)) if options.val_size else {}
    reports = {name: Report() for name in evaluation}
    for name, examples in evaluation.items():
        reports[name].read = len(examples)
    if options.eval_dataset:
        found = collect(options, stage=stage, text_field=text_field, seed=seed, held_out_only=True)
        evaluation, reports = found.evaluation, found.evaluation_reports
    return Streamed(ExampleStream(passes), evaluation, reports)


class ExampleStream(datasets.IterableDataset):
    """The training examples of a stream, in another order for every epoch (`set_epoch`).

    They are read with `format=FINISHED`, since their sources may differ in kind. `state_dict` and `load_state_dict`
    take a pass of the same epoch up where it was left; the rows before are read again, but not trained on. `read`
    takes it up without that.
    """

    def __init__(self, passes: "Passes"):
        self.passes = passes
        super().__init__(ExamplesIterable(self._numbered, {}))

    def read(self, epoch: int, cursor: Cursor) -> Iterator[Example]:
        """The examples of a pass, from where `cursor` says; it is kept up to date."""
        return (example for _, example in self.passes(epoch, cursor))

    @property
    def can_be_taken_up(self) -> bool:
        """Whether a pass can be taken up where it was left: the first so many rows of a source cannot."""
        return all(self.passes.limited(source).max_samples is None for source in self.passes.sources)

    def identity(self) -> dict[str, Any]:
        """What is read, for a checkpoint that is gone on from: names, sizes of local files, and how rows are taken."""
        options = {name: getattr(self.passes.options, name) for name in TAKEN_BY}
        return {"sources": [source_identity(source) for source in self.passes.sources], **options}

    def _numbered(self) -> Iterator[tuple[int, Example]]:
        yield from enumerate(example for _, example in self.passes(self.epoch))


TAKEN_BY = (
    *("split", "mix_strategy", "interleave_probs", "buffer_size", "format", "columns", "system_prompt"),
    *("val_size", "max_samples", "on_bad_row"),
)
"""Options of data on which the rows of a stream depend."""


def finished(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """A format whose rows are examples already, of any kind."""
    return value


def source_identity(source: Source) -> dict[str, Any]:
    """The name of a source; of a local one its files and their sizes too."""
    path = Path(source.place)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    return {"name": source.name, "files": [[file.name, file.stat().st_size] for file in files if file.is_file()]}


class Passes:
    """Passes over the sources of `dataset`: each is read, mixed and shuffled anew."""

    def __init__(self, options: DataConfig, stage: str, text_field: str, seed: int):
        self.options, self.seed = options, seed
        self.sources = sources_of(options, options.dataset)
        self.how = Reading(stage, text_field, options.on_bad_row, options.max_samples, streaming=True)
        for source in self.sources:
            check_source(source, self.how)
        weights = mixture_weights(options, len(self.sources))
        self.shares = None if weights is None else np.asarray(weights) / sum(weights)
        self.held_out: set[Key] = set()
        self.longest = [Report() for _ in self.sources]
        """Of each source, what the pass counted that has read most of it."""
        self._said: set[str] = set()
        self.notes: list[str] = []
        if len(self.sources) > 1 and self.shares is None:
            what = "mix_strategy concat reads the streams one after another; they are mixed only within the buffer"
            logger.warning("%s. Set mix_strategy: interleave_under to mix them.", what)
            self.notes.append(what)

    def __call__(self, epoch: int, cursor: Cursor | None = None) -> Iterator[tuple[Key, Example]]:
        """The examples of one pass, each with its key; `cursor` as in `data.mix.mix_streams`."""
        cursor = {} if cursor is None else cursor
        for index, saved in enumerate(cursor.get("longest", ())):
            self._count(index, Report.of(saved))
        cursor["longest"] = self.longest
        parts = [partial(self._part, index) for index in range(len(self.sources))]
        stop = STOPS.get(self.options.mix_strategy, "first")
        mixed = mix_streams(parts, self.shares, self.seed, epoch, stop=stop, cursor=cursor.setdefault("mixed", {}))
        generator = random.Random(f"{self.seed} {epoch}")
        return shuffled_stream(mixed, self.options.buffer_size, generator, cursor.setdefault("shuffled", {}))

    def hold_out(self, number: int) -> dict[str, list[Example]]:
        """The first `number` examples of the first pass, which no pass gives from now on.

        Raises: DataError where no more than these are there.
        """
        taken: dict[Key, Example] = {}
        for key, example in self(epoch=0):
            if len(taken) == number and key not in taken:
                break
            taken.setdefault(key, example)
        else:
            raise DataError(
                f"val_size: {number} would be held out of {len(taken)} rows, so none is left to train on. Lower it, "
                "or name held-out files with eval_dataset."
            )
        self.held_out = set(taken)
        if not self.options.eval_on_each_dataset or len(self.sources) == 1:
            return {"": list(taken.values())}
        sets: dict[str, list[Example]] = {}
        names = set_names(self.sources)
        for (index, _), example in taken.items():
            sets.setdefault(names[index], []).append(example)
        return sets

    def report(self) -> Report:
        """What was read so far, of every source."""
        total = Report()
        total.notes += self.notes
        for source, part in zip(self.sources, self.longest):
            seen = Report()
            seen.add(part)
            if len(self.sources) > 1:
                seen.notes = [n if n.startswith(source.name) else f"{source.name}: {n}" for n in part.notes]
            seen.kept, seen.num_unlisted = part.read - part.num_dropped, part.num_unlisted
            total.add(seen)
            total.num_unlisted += seen.num_unlisted
        if self.held_out:
            total.note(f"{len(self.held_out):,} of the rows are held out")
        return total

    def _part(self, index: int, cursor: Cursor) -> Iterator[tuple[Key, Example]]:
        """The examples of one source that are not held out."""
        source, counted = self.sources[index], Report.of(cursor["counted"]) if "counted" in cursor else Report()
        cursor.setdefault("number", -1)
        cursor.setdefault("empty", True)
        for example in source_examples(source, self.limited(source), counted, cursor.setdefault("place", {})):
            cursor["number"] += 1
            cursor["counted"] = counted
            self._count(index, counted)
            if (index, cursor["number"]) not in self.held_out:
                cursor["empty"] = False
                yield (index, cursor["number"]), example
        self._count(index, counted)
        if cursor["empty"] and self.shares is not None:
            raise DataError(f"dataset {source.name} has no row left to draw from. Leave it out, or mend its rows.")

    def limited(self, source: Source) -> Reading:
        """A stream cannot be drawn from or repeated to a size: `num_samples` are the first so many."""
        limits = [limit for limit in (source.num_samples, self.how.max_samples) if limit is not None]
        return self.how._replace(max_samples=min(limits, default=None))

    def _count(self, index: int, counted: Report) -> None:
        """Keep the counts of the pass that has come farthest, say each first bad row, and list no more than some."""
        if counted.read > self.longest[index].read:
            self.longest[index] = counted
        for problem in counted.drops:
            if problem.reason not in self._said:
                self._said.add(problem.reason)
                where = place(problem.source, problem.line)
                logger.warning("%s is dropped (%s: %s); more are counted", where, problem.reason, problem.detail)
        if len(counted.drops) > LISTED:
            counted.add(Report(), limit=LISTED)
