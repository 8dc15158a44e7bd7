"""The data options become examples: read from every source, held out, mixed, and accounted for.

sources ─ read ─► examples ─ hold out ─► what is trained on ─ num_samples, mix ─► train

Rows are held out before any is repeated, so that no row stands on both sides.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tunesmith.config import DataConfig
from tunesmith.data.load import split_rows
from tunesmith.data.mix import plan_mixture
from tunesmith.data.normalize import Example, count_duplicates, find_overlap
from tunesmith.data.prepare import note_duplicates
from tunesmith.data.registry import Source, find_sources
from tunesmith.data.report import Report
from tunesmith.data.sources import Reading, check_source, source_examples
from tunesmith.errors import ConfigError, DataError

STOPS = {"interleave_under": "first", "interleave_over": "all"}


class Counts(NamedTuple):
    """What became of the rows of one source: `read + repeated == dropped + held_out + left_out + trained`."""

    name: str
    read: int
    dropped: int
    held_out: int
    left_out: int
    """Not chosen by `num_samples`, or not drawn before an interleaving ended."""
    repeated: int
    """Times that a row comes again, by `num_samples` or an interleaving."""
    trained: int
    """Examples in `train`; tokenizing may drop some of them."""


@dataclass
class Collected:
    """The examples of a run."""

    train: list[Example]
    report: Report
    """Of `train`: its `read` counts the examples that are trained on, repeated ones too, and the rows dropped."""
    evaluation: dict[str, list[Example]] = field(default_factory=dict)
    """By name of the set; one set alone has the name `""`."""
    evaluation_reports: dict[str, Report] = field(default_factory=dict)
    counts: list[Counts] = field(default_factory=list)


def collect(
    options: DataConfig,
    *,
    stage: str = "sft",
    text_field: str = "text",
    seed: int = 42,
    held_out_only: bool = False,
    answers_needed: bool = True,
) -> Collected:
    """Read `dataset` and `eval_dataset`, hold out `val_size`, and mix.

    Args:
        options: the data part of a recipe; `streaming` is for `stream`.
        stage: pt makes texts, sft conversations, rm preferences; sources that do not fit are an error.
        text_field: column that holds the text of plain-text rows.
        seed: of the held-out rows, `num_samples` and the mixture.
        held_out_only: read only what is evaluated: `eval_dataset`, else what `val_size` holds out of `dataset`, else
            all of `dataset`.
        answers_needed: rows without an answer are bad rows; otherwise prompts, to be answered.

    Raises: ConfigError for options that do not fit together; DataError for sources and rows that cannot be used.
    """
    _check_options(options, held_out_only)
    splits = bool(options.val_size) and not options.eval_dataset
    answers_needed = answers_needed or splits  # the same rows are held out whoever asks
    how = Reading(stage, text_field, options.on_bad_row, options.max_samples, answers_needed)
    only_dataset = held_out_only and not splits
    sources = [] if only_dataset else sources_of(options, options.dataset)
    held_out = sources_of(options, options.eval_dataset or (options.dataset if only_dataset else None))
    for source in chain(sources, held_out):
        check_source(source, how)
    found = _of_dataset(sources, options, how, seed)
    if held_out_only:
        found.train, found.report, found.counts = [], Report(), []
    _add_evaluation(found, held_out, options, how, seed)
    for name, examples in found.evaluation.items():
        if overlap := find_overlap(found.train, examples):
            what = f"{overlap} of {len(examples)} held-out examples also stand in the training data"
            found.evaluation_reports[name].note(what)
    return found


def sources_of(options: DataConfig, names: str | list[str] | None) -> list[Source]:
    """The sources of `dataset` or `eval_dataset`."""
    return find_sources(
        names,
        options.dataset_dir,
        split=options.split,
        format=options.format,
        columns=options.columns,
        system_prompt=options.system_prompt,
    )


def _check_options(options: DataConfig, held_out_only: bool) -> None:
    if not (options.dataset or (held_out_only and options.eval_dataset)):
        what = (
            "eval_dataset is missing. Name the held-out examples" if held_out_only else "dataset is missing. Name it"
        )
        raise ConfigError(f"{what}: a file, a folder, a Hub id, or a name in dataset_info.json.")
    if options.eval_dataset and options.val_size:
        raise ConfigError("eval_dataset and val_size both say what is held out. Keep one.")


# What is trained on ------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """The examples of one source on their way."""

    source: Source
    examples: list[Example]
    read: int
    dropped: int
    size: int
    """How many examples the source gives, held-out ones included: `num_samples` may ask for more than it has."""
    held_out: int = 0
    left_out: int = 0
    trained: int = 0

    def counts(self) -> Counts:
        """The sum, made up by what was repeated."""
        gone = self.dropped + self.held_out + self.left_out + self.trained
        return Counts(
            self.source.name,
            self.read,
            self.dropped,
            self.held_out,
            self.left_out,
            gone - self.read,
            self.trained,
        )


def _of_dataset(sources: Sequence[Source], options: DataConfig, how: Reading, seed: int) -> Collected:
    """What the sources of `dataset` give to train on and, with `val_size`, to evaluate."""
    report = Report()
    parts = [_read(source, how, seed, report, len(sources) > 1) for source in sources]
    if (options.format or options.columns) and any(source.is_registered for source in sources):
        report.note("format and columns are for files and Hub ids; entries of dataset_info.json say their own")
    found = Collected([], report)
    if options.val_size and not options.eval_dataset and parts:
        for name, examples in _hold_out(parts, options, seed).items():
            found.evaluation[name] = examples
            found.evaluation_reports[name] = _report_of(examples)
    distinct = list(chain.from_iterable(part.examples for part in parts))
    note_duplicates(report, count_duplicates(distinct), len(distinct))
    found.train = _mixed(parts, options, seed)
    found.counts = [part.counts() for part in parts]
    for line in _accounts(found.counts):
        report.note(line)
    report.read = len(found.train) + report.num_dropped
    return found


def _read(source: Source, how: Reading, seed: int, report: Report, is_one_of_several: bool = False) -> Part:
    """The examples of a source; with `num_samples` below their number, so many, drawn by the seed, in their order."""
    own = Report()
    if source.num_samples is not None:
        limit, how = how.max_samples, how._replace(max_samples=None)
        wanted = source.num_samples if limit is None else min(source.num_samples, limit)
    examples = list(source_examples(source, how, own))
    size = len(examples) if source.num_samples is None else wanted
    part = Part(source, examples, own.read, own.num_dropped, size)
    if size < len(examples):
        chosen = sorted(random.Random(seed).sample(range(len(examples)), size))
        part.examples, part.left_out = [examples[index] for index in chosen], len(examples) - size
    if is_one_of_several:
        own.notes = [note if note.startswith(source.name) else f"{source.name}: {note}" for note in own.notes]
    report.add(own)
    return part


def _hold_out(parts: Sequence[Part], options: DataConfig, seed: int) -> dict[str, list[Example]]:
    """Take `val_size` out of all parts together; the examples held out, by part if each is to be evaluated."""
    owners = [index for index, part in enumerate(parts) for _ in part.examples]
    _, places = split_rows(range(len(owners)), options.val_size, seed)
    first = np.cumsum([0, *(len(part.examples) for part in parts)])
    taken: list[list[Example]] = [[] for _ in parts]
    for place in places:
        taken[owners[place]].append(parts[owners[place]].examples[place - first[owners[place]]])
    held = set(places)
    for index, part in enumerate(parts):
        part.held_out = len(taken[index])
        part.examples = [e for place, e in enumerate(part.examples, first[index]) if place not in held]
        part.size -= part.held_out
    if options.eval_on_each_dataset and len(parts) > 1:
        names = set_names([part.source for part in parts])
        return {name: examples for name, examples in zip(names, taken) if examples}
    return {"": list(chain.from_iterable(taken))}


def _mixed(parts: Sequence[Part], options: DataConfig, seed: int) -> list[Example]:
    """The examples to train on, in the order that the mixture gives them."""
    if not parts:  # only held-out examples are read
        return []
    for part in parts:
        part.examples = _repeated(part.examples, part.size, seed)
    strategy, weights = options.mix_strategy, mixture_weights(options, len(parts))
    if strategy == "concat" or len(parts) < 2:
        for part in parts:
            part.trained = len(part.examples)
        return list(chain.from_iterable(part.examples for part in parts))
    for part in parts:
        if not part.examples:
            raise DataError(
                f"dataset {part.source.name} has no row left to draw from. Leave it out, or mend its rows."
            )
    plan = plan_mixture([len(part.examples) for part in parts], weights, seed, STOPS[strategy])
    for index, part in enumerate(parts):
        drawn = plan[plan[:, 0] == index, 1]
        part.trained = len(drawn)
        # of an example that num_samples repeats, a copy may be left out while another is drawn
        part.left_out += len({id(e) for e in part.examples} - {id(part.examples[row]) for row in drawn})
    return [parts[index].examples[row] for index, row in plan.tolist()]


def _repeated(examples: list[Example], size: int, seed: int) -> list[Example]:
    """So many examples: all of them again and again, and at the end some, drawn by the seed."""
    if size <= len(examples) or not examples:
        return examples
    times, rest = divmod(size, len(examples))
    return examples * times + random.Random(seed).sample(examples, rest)


def mixture_weights(options: DataConfig, number: int) -> list[float] | None:
    """`interleave_probs` as numbers, equal ones where none are given; `None` for datasets one after another.

    Raises: ConfigError for another strategy, numbers that are none, do not add up to 1, or are not one for each.
    """
    given, strategy = options.interleave_probs, options.mix_strategy
    if strategy != "concat" and strategy not in STOPS:
        raise ConfigError(f"mix_strategy: unknown strategy '{strategy}'. Known: concat, {', '.join(STOPS)}.")
    if given is None or given == "":
        return None if strategy == "concat" else [1 / max(1, number)] * number
    if strategy == "concat":
        raise ConfigError("interleave_probs needs mix_strategy: interleave_under or interleave_over.")
    try:
        weights = [float(part) for part in (given.split(",") if isinstance(given, str) else given)]
    except (TypeError, ValueError):
        raise ConfigError(f"interleave_probs: expected numbers such as 0.3,0.7, got {given!r}.") from None
    if len(weights) != number:
        raise ConfigError(f"interleave_probs: {len(weights)} given for {number} datasets. Give one for each.")
    if not all(0 <= weight <= 1 for weight in weights) or not abs(sum(weights) - 1) <= 0.011:
        raise ConfigError(f"interleave_probs: {given!r} add up to {sum(weights):g}. Give shares that add up to 1.")
    return weights


def _accounts(counts: Sequence[Counts]) -> Iterable[str]:
    """What each source gives, where there are several or it is not simply all that was read and good."""
    for count in counts:
        if len(counts) == 1 and not (count.left_out or count.repeated):
            continue
        parts = (
            (count.dropped, "dropped"),
            (count.held_out, "held out"),
            (count.left_out, "left out"),
            (count.repeated, "repeated"),
        )
        said = "".join(f", {number:,} {word}" for number, word in parts if number)
        yield f"{count.name}: {count.read:,} rows read{said}: {count.trained:,} to train on"


# What is evaluated -------------------------------------------------------------------------------------------------


def _add_evaluation(found: Collected, sources: Sequence[Source], options: DataConfig, how: Reading, seed: int) -> None:
    """Read the sources of `eval_dataset` into one set, or into one set each."""
    apart = options.eval_on_each_dataset and len(sources) > 1
    for name, source in zip(set_names(sources) if apart else [""] * len(sources), sources):
        report = found.evaluation_reports.setdefault(name, Report())
        part = _read(source, how, seed, report, len(sources) > 1)
        report.read -= part.left_out
        found.evaluation.setdefault(name, []).extend(part.examples)
        if part.left_out:
            report.note(f"{source.name}: {part.left_out:,} rows left out by num_samples")
    for name, examples in found.evaluation.items() if sources else ():
        note_duplicates(found.evaluation_reports[name], count_duplicates(examples), len(examples))


def _report_of(examples: Sequence[Example]) -> Report:
    report = Report()
    report.read = len(examples)
    return report


def set_names(sources: Sequence[Source]) -> list[str]:
    """Short names of sets, for figures such as `eval_<name>_loss`; the second of the same name ends in `_2`."""
    names: list[str] = []
    for source in sources:
        last = source.name if source.is_registered else Path(source.name.rstrip("/")).name
        short = last if source.is_hub or source.is_registered else Path(last).stem
        number = sum(name == short or name.startswith(f"{short}_") for name in names)
        names.append(short if short not in names else f"{short}_{number + 1}")
    return names
