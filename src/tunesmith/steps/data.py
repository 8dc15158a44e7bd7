"""The data of a run: recipe and tokenizer → token rows and held-out examples, with their reports."""

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import datasets
from rich.console import Console

from tunesmith.config import TrainingFields
from tunesmith.data.cache import cache_of
from tunesmith.data.collect import collect
from tunesmith.data.normalize import Example
from tunesmith.data.pack import length_before_packing, tail_note
from tunesmith.data.pairs import encode_pairs
from tunesmith.data.prepare import encode_examples
from tunesmith.data.report import Report, first_row_lines, preview
from tunesmith.data.stream import stream
from tunesmith.deliver.summary import show_reports
from tunesmith.errors import ConfigError
from tunesmith.model.open import longest_text
from tunesmith.recipe import Recipe, is_resolved, phases
from tunesmith.steps.options import option, seed_of

LOOKED_AT = 100
"""Examples of a stream that `tunesmith check` reads."""


class Prepared(NamedTuple):
    """The data of a run, tokenized, with its reports; evaluation sets by name, the only one of a run as ""."""

    train: Any = None
    """Token rows, or a stream of examples that the trainer tokenizes; `None` where nothing is trained."""
    report: Report | None = None
    evaluation: dict[str, Any] = {}  # noqa: RUF012 - never changed
    evaluation_reports: dict[str, Report] = {}  # noqa: RUF012
    evaluation_examples: dict[str, list[Example]] = {}  # noqa: RUF012

    @property
    def held_out(self) -> list[Example]:
        """The examples of all evaluation sets, one set after another."""
        return [example for examples in self.evaluation_examples.values() for example in examples]

    @property
    def evaluation_sets(self) -> Any:
        """The evaluation data as a trainer takes it: one dataset, a dict of several, or `None`."""
        return self.evaluation.get("", self.evaluation) if self.evaluation else None

    @property
    def held_out_pairs(self) -> Any:
        """The pairs of all evaluation sets, one set after another; their `index` counts through `held_out`."""
        parts, before = [], 0
        for name, pairs in self.evaluation.items():
            numbers = [before + index for index in pairs["index"]]
            parts.append(pairs.remove_columns("index").add_column("index", numbers))
            before += len(self.evaluation_examples[name])
        return datasets.concatenate_datasets(parts)


def prepare_data(recipe: Recipe, tokenizer: Any) -> Prepared:
    """Load, mix, split, render and tokenize."""
    todo, train, report = phases(recipe), None, None
    how = {"stage": recipe.run.stage, "text_field": option(recipe, "dataset_text_field"), "seed": seed_of(recipe)}
    needs_answers = todo.train or todo.evaluate or recipe.run.stage == "rm"
    if not todo.train:
        found = collect(recipe.data, **how, held_out_only=True, answers_needed=needs_answers)
    elif recipe.data.streaming:
        found = stream(recipe.data, **how)
        train, report = found.train, found.report
    else:
        found = collect(recipe.data, **how)
        check_turns(recipe, found.train)
        train, report = encode(recipe, found.train, tokenizer, found.report), found.report
    evaluation = {}
    for name, examples in found.evaluation.items():
        if needs_answers:
            evaluation[name] = encode(recipe, examples, tokenizer, found.evaluation_reports[name])
        else:
            found.evaluation_reports[name].kept = len(examples)  # each is asked
    return Prepared(train, report, evaluation, found.evaluation_reports, found.evaluation)


def first_of_stream(recipe: Recipe, tokenizer: Any, data: Prepared) -> Prepared:
    """The data with the first rows of its stream read and tokenized, without the large buffer that shuffles them."""
    few = dataclasses.replace(recipe.data, buffer_size=min(recipe.data.buffer_size, LOOKED_AT))
    found = stream(few, stage=recipe.run.stage, text_field=option(recipe, "dataset_text_field"), seed=seed_of(recipe))
    examples = list(islice(found.train.read(epoch=0, cursor={}), LOOKED_AT))
    check_turns(recipe, examples)
    report = found.report
    report.read, report.kept = len(examples) + report.num_dropped, 0
    rows = encode(recipe, examples, tokenizer, report)
    report.note(f"of a stream the first {report.read:,} rows are looked at")
    return data._replace(train=rows, report=report)


def check_turns(recipe: Recipe, examples: Sequence[Example]) -> None:
    """Raise ConfigError where `train_on` chooses among turns, and the examples are plain text, which has none."""
    chosen, where = option(recipe, "train_on"), recipe.given.get("train_on")
    is_default = chosen == TrainingFields.train_on and (where is None or is_resolved(recipe))
    if recipe.run.stage != "sft" or chosen == "all" or is_default:
        return
    if examples and all("text" in example for example in examples):
        raise ConfigError(
            f"{where}: train_on: {chosen} chooses among turns, and the examples are plain text, which has none. Set "
            "train_on: all, or give conversations, or prompts with completions."
        )


def check_data(recipe: Recipe, data: Prepared) -> None:
    """Raise DataError where nothing, or suspiciously little, would be trained, evaluated or asked."""
    if data.report is not None and not recipe.data.streaming:  # a stream is counted as it is read
        data.report.check(recipe.data.max_drop_ratio)
    for report in data.evaluation_reports.values():
        report.check(recipe.data.max_drop_ratio, "evaluate")
    for what, report in sets_in_blocks(recipe, data):
        tail_note(report.num_tokens, block_length(recipe), what)


def note_tails(recipe: Recipe, data: Prepared) -> None:
    """Let the reports say what blocks will leave out, before there is a trainer that does."""
    for _, report in sets_in_blocks(recipe, data):
        length = block_length(recipe)
        if report.num_tokens >= length and (note := tail_note(report.num_tokens, length)):
            report.note(note)


def sets_in_blocks(recipe: Recipe, data: Prepared) -> Iterator[tuple[str, Report]]:
    """What is cut into blocks of one length, by its name in errors, with its report."""
    if option(recipe, "packing_strategy") != "blocks" or block_length(recipe) is None:
        return
    packing, evaluated = option(recipe, "packing"), option(recipe, "eval_packing")
    if packing and data.report is not None and not recipe.data.streaming:
        yield "all texts together", data.report
    for name, report in data.evaluation_reports.items():
        if (packing if evaluated is None else evaluated) and report.num_tokens:  # none where each is only asked
            yield f"the texts of the evaluation set{f' {name}' * bool(name)}", report


def block_length(recipe: Recipe) -> int | None:
    """Tokens of a block, or of the longest text; `None` where nobody says."""
    return option(recipe, "max_length") or longest_text(recipe.model, training=phases(recipe).train)


def encode(recipe: Recipe, examples: Sequence[Example], tokenizer: Any, report: Report) -> Any:
    """Examples as tokens, the way the recipe says: rows of a text, or of two answers in stage rm."""
    max_length = block_length(recipe)
    names = ("too_long", "chat_template_kwargs", "max_source_length", "max_target_length")
    how = {name: option(recipe, name) for name in names} | {"on_bad_row": recipe.data.on_bad_row}
    if recipe.run.stage == "rm":
        return encode_pairs(examples, tokenizer, report, max_length=max_length, **how)
    if option(recipe, "packing") and max_length is not None:
        max_length = length_before_packing(max_length, option(recipe, "packing_strategy"), option(recipe, "too_long"))
    return encode_examples(
        examples,
        tokenizer,
        report,
        batch_size=option(recipe, "dataset_batch_size"),
        num_proc=option(recipe, "dataset_num_proc"),
        cache=cache_of(recipe.data.data_cache_dir, recipe.data.overwrite_cache),
        train_on=option(recipe, "train_on"),
        append_eos=option(recipe, "append_eos"),
        max_length=max_length,
        **how,
    )


def show_data(data: Prepared, tokenizer: Any, console: Console, rows: int = 0) -> None:
    """The report of each set, and the first row's ids, or with `rows` real rows with the trained tokens marked."""
    show_reports(data.report, data.evaluation_reports, console)
    shown = next((part for part in (data.train, *data.evaluation.values()) if hasattr(part, "select")), None)
    if shown is None or not len(shown):
        return
    if rows and "input_ids" in shown.column_names:
        preview(list(shown.select(range(min(rows, len(shown))))), tokenizer, console, rows=rows)
    else:
        for line in first_row_lines(shown, tokenizer):
            console.out(line, highlight=False)


def after_stream(data: Prepared, tokenized: Report | None) -> Prepared:
    """The data with the report of what training has read of its stream: before it there was nothing to tell.

    Args:
        tokenized: what the trainer has counted over all passes.
    """
    report = data.train.passes.report()
    if tokenized is not None and (lost := tokenized.losses()):
        report.note(f"tokenized, over all passes: {lost}")
    for note in tokenized.notes if tokenized is not None else ():
        if not note.startswith("format: "):  # the report of the source tells it
            report.note(note)
    return data._replace(report=report)


def evaluation_notes(trainer: Any, data: Prepared) -> list[str]:
    """What only the trainer found out about the evaluation sets, put into the reports on them, as lines."""
    lines = []
    for name, report in data.evaluation_reports.items():
        place = f"[{name}]" if name else ""
        lines += taken_over(trainer, f"eval_dataset{place}", report, f"evaluation data{place}")
    return lines


def taken_over(trainer: Any, dataset: str, report: Any, title: str) -> list[str]:
    """The trainer's notes on a dataset, put into the run's report on it, as lines."""
    found = trainer.reports.get(dataset)
    if report is None or found is None or found is report:
        return []
    for note in found.notes:
        report.note(note)
    return [f"{title}: {note}" for note in found.notes]


def report_json(data: Prepared) -> dict[str, Any]:
    """The reports as data."""
    held_out = {name: report.to_json() for name, report in data.evaluation_reports.items()}
    train = None if data.report is None else data.report.to_json()
    return {"train": train, "evaluation": held_out.get("", held_out) or None}
