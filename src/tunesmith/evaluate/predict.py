"""Held-out examples → generated_predictions.jsonl, metrics, and the before/after table."""

import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.config import DecodingConfig
from tunesmith.evaluate.generate import answer_decoding, context_length, generate_texts, stop_token_ids
from tunesmith.evaluate.metrics import PERCENTAGES, Metric, metrics_for
from tunesmith.evaluate.questions import Question, ask, fitted
from tunesmith.ranks import gathered, rank_and_world
from tunesmith.runs import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class Comparison(NamedTuple):
    """One held-out prompt answered twice."""

    prompt: str
    expected: str
    before: str
    after: str


def predict(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    examples: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    decoding: DecodingConfig | Mapping[str, Any] | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    metric: str | Sequence[str] | Metric | None = None,
    max_source_length: int | None = None,
    seed: int = 42,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Answer every example and write `{"index", "prompt", "label", "predict"}` lines, with `id` where a row has one.

    Lines are appended as batches finish, so a run that is cut short keeps its answers; when all are there the file is
    written anew in the order of the examples. Where there are several processes all must call this: each answers its
    share, into a file beside the one of the first, which then writes the whole; all return the same figures.

    Args:
        model: generates on its own device.
        tokenizer: read, not changed.
        examples: `Example`s with messages or prompt and completion; the last assistant turn or the completion is the
            label, what comes before it the prompt. Without an answer the label is null.
        path: the file, usually `generated_predictions.jsonl` in the run directory.
        decoding: see `DecodingConfig`; `eval_num_beams` wins over `num_beams`.
        chat_template: Jinja text used in place of the tokenizer's own.
        chat_template_kwargs: variables of the template for all examples; an example's own win.
        metric: names in `METRICS` or `file.py:function`, or a function; computed over the examples that have a label.
        max_source_length: longest prompt, in tokens; the end of what was asked is cut from a longer one (not what the
            template writes behind it), and counted. None: a prompt that the model cannot read is an error.
        seed: of sampling.
        progress: called with (answered, all) of this process after each batch.

    Returns: `predict_samples`, `predict_runtime` in seconds, `predict_samples_per_second`, `predict_steps_per_second`,
        `predict_cut_prompts` if there were any, and the metric's figures under their own names.
        Without any label the metric is left out, with a warning in the log.
    Raises: DataError for plain-text examples, and for one that cannot be rendered as training would, or is too long.
    """
    started, options = time.monotonic(), answer_decoding(decoding)
    questions = [
        ask(example, tokenizer, chat_template, index, chat_template_kwargs) for index, example in enumerate(examples)
    ]
    asked, cut = fitted(questions, tokenizer, max_source_length, context_length(model), examples)
    score = None
    if metric is not None:
        score = metrics_for(metric, (), [question.label or "" for question in questions])
    answers = generate_texts(
        model,
        tokenizer,
        [question.prompt.input_ids for question in asked],
        decoding=options,
        stop_ids=stop_token_ids(model, tokenizer, chat_template),
        seed=seed,
        share=rank_and_world(),
        progress=progress,
    )
    rows = ((index, prediction_row(index, asked[index], answer, examples[index])) for index, answer in answers)
    ordered = streamed(rows, Path(path))
    figures = speed_figures(len(ordered), time.monotonic() - started, options["generation_batch_size"])
    figures |= {"predict_cut_prompts": cut} if cut else {}
    if score and not any(row["label"] is not None for row in ordered):
        logger.warning("No example has an expected answer, so the metric is left out.")
        score = None
    return figures | (scores(score, ordered) if score else {})


def prediction_row(index: int, question: Question, answer: str, example: Mapping[str, Any]) -> dict[str, Any]:
    """What the predictions file says of one example."""
    name = {"id": example["id"]} if example.get("id") is not None else {}
    return {"index": index, **name, "prompt": question.prompt.text, "label": question.label, "predict": answer}


def streamed(rows: Iterable[tuple[int, dict[str, Any]]], path: Path) -> list[dict[str, Any]]:
    """Write rows as they come, then all of them in order; returns those of all processes, each row once."""
    rank, _ = rank_and_world()
    share = path if rank == 0 else path.with_name(f"{path.name}.rank{rank}")
    found: dict[int, dict[str, Any]] = {}
    with open(share, "w", encoding="utf-8") as file:
        for index, row in rows:
            found[index] = row
            file.write(json_line(row))
            file.flush()
    found = dict(gathered(list(found.items())))
    ordered = [found[index] for index in sorted(found)]
    if rank == 0:
        write_text(path, "".join(json_line(row) for row in ordered))
    else:
        share.unlink()
    return ordered


def json_line(row: Mapping[str, Any]) -> str:
    """A line of a predictions file."""
    text = json.dumps(row, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "replace").decode()  # lone surrogates have no UTF-8


def speed_figures(samples: int, seconds: float, batch_size: int) -> dict[str, float]:
    """What the run took, under transformers' names; a step is a batch."""
    seconds = max(seconds, 1e-9)
    return {
        "predict_samples": samples,
        "predict_runtime": round(seconds, 4),
        "predict_samples_per_second": round(samples / seconds, 3),
        "predict_steps_per_second": round(math.ceil(samples / batch_size) / seconds, 3),
    }


def prefixed(figures: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Figures under the names that transformers gives them in results files: `bleu-4` is `predict_bleu-4`.

    >>> prefixed({"bleu-4": 1.0, "predict_runtime": 2.0}, "predict")
    {'predict_bleu-4': 1.0, 'predict_runtime': 2.0}
    """
    return {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in figures.items()}


def scores(metric: Metric, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metric over the rows of a predictions file that have a label."""
    labelled = [row for row in rows if row["label"] is not None]
    return metric([row["predict"] for row in labelled], [row["label"] for row in labelled])


# ---------------------------------------------------------------------------------------------------- the table


def comparisons(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    before: str | Path,
    after: str | Path,
    *,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    limit: int = 5,
) -> list[Comparison]:
    """The first `limit` examples beside their answers in two prediction files that `predict` wrote over them."""
    rows = []
    for index, (one, other) in enumerate(zip(read_predictions(before)[:limit], read_predictions(after))):
        asked = ask(examples[index], tokenizer, chat_template, index, chat_template_kwargs).asked
        rows.append(Comparison(asked, one["label"] or "", one["predict"], other["predict"]))
    return rows


def read_predictions(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a predictions file."""
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def before_after_table(
    rows: Sequence[Comparison | Mapping[str, str]],
    console: Console,
    before: Mapping[str, float] | None = None,
    after: Mapping[str, float] | None = None,
) -> None:
    """Print what the model answered before and after training, and the metric over all compared rows.

    Args:
        rows: a few held-out prompts with the expected text and both answers.
        console: a table on a terminal that is wide enough, plain paragraphs elsewhere.
        before: the metric's figures before training, e.g. `{"exact_match": 0.0}`.
        after: the same figures after training.
    """
    comparisons = [row if isinstance(row, Comparison) else Comparison(**row) for row in rows]
    if console.is_terminal and console.width >= 80:
        console.print(_table(comparisons))
    else:
        for number, row in enumerate(comparisons, 1):
            console.out(_paragraph(number, row), highlight=False)
    for name, value in (after or {}).items():
        was = f"{before[name]:.1f} → " if before and name in before else ""
        unit = " %" if name in PERCENTAGES else ""
        console.out(f"{name.replace('_', ' ')}: {was}{value:.1f}{unit}", highlight=False)


def _table(rows: Sequence[Comparison]) -> Table:
    table = Table(show_lines=True, title="Held-out prompts, before and after training", title_justify="left")
    for heading in ("prompt", "expected", "before", "after"):
        table.add_column(heading, ratio=1, overflow="fold")
    for row in rows:
        is_right = row.after.strip() == row.expected.strip()
        shown = [Text(shorten(printable(text), 240)) for text in row]
        shown[3].stylize("green" if is_right else "yellow")
        table.add_row(*shown)
    return table


def _paragraph(number: int, row: Comparison) -> str:
    lines = [f"{number}. prompt:   {_one_line(row.prompt)}"]
    lines += [f"   {name + ':':9} {_one_line(text)}" for name, text in zip(row._fields[1:], row[1:])]
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return shorten(" ".join(printable(text).split()), 240) or "(nothing)"


def shorten(text: str, limit: int) -> str:
    """Cut out the middle: the beginning and the end of a prompt say most.

    >>> shorten("abcdefghij", 7)
    'abc … j'
    """
    if len(text) <= limit:
        return text
    tail = (limit - 3) // 3
    return f"{text[: limit - 3 - tail]} … {text[len(text) - tail :]}"


_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-_]?")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text that cannot move the cursor, recolour the terminal or turn the writing direction; line ends stay."""
    return _CONTROLS.sub("", _ESCAPES.sub("", text))
