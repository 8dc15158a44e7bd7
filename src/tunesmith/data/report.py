"""What was kept, changed and dropped, and why; how many tokens train; and a preview of what the loss covers."""

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tunesmith.data import IGNORE_INDEX
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

NUM_FIRST = 5  # places named for each reason
MIN_TRAINED_SHARE = 0.005
NUM_BINS = 10
MAX_RUN_CHARACTERS = 600
MAX_RUNS = 60


# Words for a terminal ----------------------------------------------------------------------------------------------

# Control characters (among them the escape that starts ANSI and OSC sequences), marks that turn the reading direction,
# invisible characters, line ends other than a line feed, halves of characters. The zero-width joiner stays, for emoji.
UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str, limit: int | None = None, keep: str = "") -> str:
    r"""`text` made safe to print: unsafe characters but those in `keep` as escapes, cut to `limit` characters.

    >>> print(visible("\x1b[31mred"))
    \x1b[31mred
    """
    few = text if limit is None else text[: limit + 1]
    safe = UNSAFE.sub(lambda match: match[0] if match[0] in keep else _escape(match[0]), few)
    return safe if limit is None or len(safe) <= limit else safe[: limit - 1] + "…"


def _escape(character: str) -> str:
    named = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    code = ord(character)
    width = "x02" if code < 0x100 else "u04" if code < 0x10000 else "U08"
    return named.get(character) or f"\\{width[0]}{code:{width[1:]}x}"


def place(source: str, line: int) -> str:
    """Where a row stands: `data.jsonl:3` where files count lines, `data.json row 3` where rows are counted."""
    if not line:
        return visible(source)
    counts_lines = os.path.splitext(source)[1].lower() in (".jsonl", ".csv", ".txt")
    return f"{visible(source)}:{line}" if counts_lines else f"{visible(source)} row {line}"


# Counts ------------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """Why one row was dropped or changed."""

    source: str
    line: int
    reason: str
    detail: str


def count_trained(labels: Sequence[int]) -> int:
    """Tokens of a row that the loss covers; the first has nothing before it that it could be predicted from.

    >>> count_trained([7, -100, 8, 9])
    2
    """
    labels = labels if isinstance(labels, list) else list(labels)
    return len(labels) - labels.count(IGNORE_INDEX) - (labels[:1] not in ([], [IGNORE_INDEX]))


class Report:
    """Counts of every row by what became of it. Each row read is kept or dropped, once; a kept row may be changed."""

    def __init__(self):
        self.read = 0
        self.kept = 0
        """Set by the caller when nothing more can be dropped; then `read == kept + num_dropped`."""
        self.notes: list[str] = []
        self.drops: list[Problem] = []
        self.num_unlisted = 0
        """Dropped rows beyond those in `drops`: of a stream, the first are listed."""
        self.changes: list[Problem] = []
        self.num_unlisted_changes = 0
        """Changed rows beyond those in `changes`."""
        self.num_tokens = 0
        self.num_trained = 0
        self.lengths: list[int] = []

    def dropped(self, reason: str, row: Any, detail: str = "") -> None:
        """Count a row that will not be trained on; once per row. `row` has `.source` and `.line`, or is an example."""
        self.drops.append(_problem(reason, row, detail))

    def changed(self, reason: str, row: Any, detail: str = "") -> None:
        """Count a row that is not as its author wrote it, such as one that was cut; once per row and reason."""
        self.changes.append(_problem(reason, row, detail))

    def note(self, text: str) -> None:
        """Say something about the data as a whole, once."""
        if (note := visible(text)) not in self.notes:
            self.notes.append(note)

    @property
    def num_dropped(self) -> int:
        """Rows that will not be trained on."""
        return len(self.drops) + self.num_unlisted

    def add_tokens(self, tokens: Iterable[Mapping[str, Sequence[int]]]) -> None:
        """Add the examples that are ready to train: their lengths, and how many of their tokens the loss covers."""
        for row in tokens:
            self.lengths.append(len(row["input_ids"]))
            self.num_tokens += len(row["input_ids"])
            self.num_trained += count_trained(row["labels"])

    def add(self, part: "Report", limit: int | None = None) -> None:
        """Add what became of further rows; at most `limit` lengths, drops and changes are listed, all are counted."""
        self.read += part.read
        self.kept += part.kept
        self.num_tokens += part.num_tokens
        self.num_trained += part.num_trained
        self.notes += [note for note in part.notes if note not in self.notes]
        self.drops += part.drops
        self.changes += part.changes
        self.lengths += part.lengths
        if limit is not None:
            self.num_unlisted += len(self.drops[limit:])
            self.num_unlisted_changes += _num_rows(self.changes[limit:])
            for listed in (self.drops, self.changes, self.lengths):
                del listed[limit:]

    def state(self) -> dict[str, Any]:
        """Everything that is counted, as data that `of` reads."""
        lists = {"drops": list(map(list, self.drops)), "changes": list(map(list, self.changes))}
        return {**vars(self), **lists}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Report":
        """The report with that state."""
        report = cls()
        vars(report).update(state)
        report.drops = [Problem(*problem) for problem in state["drops"]]
        report.changes = [Problem(*problem) for problem in state["changes"]]
        return report

    def check(self, max_drop_ratio: float, use: str = "train on") -> None:
        """Stop a run that would train on nothing, on next to nothing, or on too little of what was given.

        Args:
            max_drop_ratio: share of the rows that may be dropped.
            use: what the rows are for, "train on" or "evaluate".

        Raises: DataError that names the reasons and their first rows.
        """
        reasons = "\n".join(f"  {line}" for line in [*_reason_lines(self.drops), *_first_details(self.drops)])
        if self.read == 0:
            option = "dataset" if use == "train on" else "eval_dataset"
            raise DataError(f"no rows were read, so there is nothing to {use}. Check what {option} names.")
        if self.kept == 0:
            all_rows = "the only row was" if self.read == 1 else f"all {self.read:,} rows were"
            raise DataError(
                f"nothing is left to {use}: {all_rows} dropped.\n{reasons}\n"
                "Mend the rows, or change the setting that the reason names."
            )
        if self.num_dropped > max_drop_ratio * self.read:
            raise DataError(
                f"{self.num_dropped} of {_count(self.read, 'row')} ({_percent(self.num_dropped, self.read)}) would be "
                f"dropped; max_drop_ratio allows {100 * max_drop_ratio:g} %.\n{reasons}\n"
                f"Mend them, or allow it with max_drop_ratio: {_ratio_that_allows(self.num_dropped, self.read)}."
            )
        if self.num_tokens and self.num_trained < MIN_TRAINED_SHARE * self.num_tokens:
            trained = f"{self.num_trained:,} of {_count(self.num_tokens, 'token')} would be trained"
            raise DataError(
                f"{trained if self.num_trained else 'nothing is trained: ' + trained} "
                f"({_percent(self.num_trained, self.num_tokens)}). Look at the rows with `tunesmith check`; "
                "the loss covers what train_on and the messages' train flags and weights leave."
            )

    def to_json(self) -> dict[str, Any]:
        """The report as data: totals, each reason with its first rows, tokens, and every dropped or changed row."""
        return {
            "rows": {"read": self.read, "kept": self.kept, "dropped": self.num_dropped},
            "dropped": _by_reason(self.drops),
            "changed": _by_reason(self.changes),
            "notes": list(self.notes),
            "tokens": self.token_statistics(),
            "dropped_rows": [problem._asdict() for problem in self.drops],
            "changed_rows": [problem._asdict() for problem in self.changes],
        }

    def token_statistics(self) -> dict[str, Any] | None:
        """Totals, the lengths' min, median, mean, p95 and max, and a histogram; None if there are no rows."""
        if not self.lengths:
            return None
        ordered = sorted(self.lengths)
        return {
            "num_tokens": self.num_tokens,
            "num_trained": self.num_trained,
            "trained_share": round(self.num_trained / max(1, self.num_tokens), 4),
            "min": ordered[0],
            "median": ordered[len(ordered) // 2],
            "mean": round(sum(ordered) / len(ordered), 1),
            "p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
            "max": ordered[-1],
            "histogram": [bin._asdict() for bin in histogram(ordered)],
        }

    def table(self, console: "Console | None" = None) -> str:
        """The report for a person as plain text; also printed, fitted to its width, if a `console` is given."""
        lines = list(self._lines(*_shape(console)))
        text = "\n".join(line for line, _ in lines)
        if console is not None and console.is_terminal:
            from rich.text import Text

            for line, style in lines:
                console.print(Text(line, style))
        elif console is not None:
            console.out(text, highlight=False)
        return text

    def _lines(self, width: int, block: str) -> Iterator[tuple[str, str]]:
        """Each line and its style on a terminal."""
        yield self._headline(), "bold"
        yield from ((note, "") for note in self.notes)
        yield from ((f"  dropped  {line}", "red") for line in _reason_lines(self.drops))
        yield from ((f"  changed  {line}", "yellow") for line in _reason_lines(self.changes))
        if statistics := self.token_statistics():
            share = _percent(self.num_trained, self.num_tokens)
            yield f"{_count(self.num_tokens, 'token')}, {self.num_trained:,} trained ({share})", ""
            parts = (f"{key} {statistics[key]:,}" for key in ("min", "median", "mean", "p95", "max"))
            yield f"tokens per row: {', '.join(parts)}", ""
            yield from ((f"  {line}", "cyan") for line in draw(histogram(self.lengths), width - 2, block))

    def losses(self) -> str:
        """One line on the rows that are dropped or changed, with the first places; empty if there are none."""
        lines = [f"dropped: {line}" for line in _reason_lines(self.drops)]
        lines += [f"changed: {line}" for line in _reason_lines(self.changes)]
        return "; ".join([self._headline(), *(" ".join(line.split()) for line in lines)]) if lines else ""

    def _headline(self) -> str:
        num_changed = _num_rows(self.changes) + self.num_unlisted_changes
        parts = [f"{_count(self.read, 'row')} read", f"{self.kept:,} kept", f"{self.num_dropped:,} dropped"]
        return ", ".join([*parts, f"{num_changed:,} changed"] if num_changed else parts)


def _problem(reason: str, row: Any, detail: str) -> Problem:
    if isinstance(row, Mapping):
        source, line = row.get("source", ""), row.get("line", 0)
    else:
        source, line = row.source, row.line
    for where in (
        f"{source}:{line}",
        f"{source} row {line}",
        place(source, line),
    ):  # an error's sentence names the place, which is known here
        detail = detail.removeprefix(f"{where}: ")
    return Problem(source, line, reason, visible(detail))


def _num_rows(problems: Iterable[Problem]) -> int:
    return len({(problem.source, problem.line) for problem in problems})


def _by_reason(problems: Iterable[Problem]) -> dict[str, dict[str, Any]]:
    """Reason → number of rows and the first of them, the most frequent reason first."""
    groups: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        groups[problem.reason].append(problem)
    return {
        reason: {
            "rows": len(group),
            "first": [{"source": problem.source, "line": problem.line} for problem in group[:NUM_FIRST]],
        }
        for reason, group in sorted(groups.items(), key=lambda item: -len(item[1]))
    }


def _reason_lines(problems: Iterable[Problem]) -> list[str]:
    entries = _by_reason(problems)
    width = max(map(len, entries), default=0)
    return [
        f"{reason:<{width}}  {_count(entry['rows'], 'row'):>8}  {', '.join(_places(entry['first']))}"
        + ", ..." * (entry["rows"] > NUM_FIRST)
        for reason, entry in entries.items()
    ]


def _first_details(problems: Iterable[Problem]) -> list[str]:
    """What was wrong with the first row of each reason."""
    first: dict[str, Problem] = {}
    for problem in problems:
        first.setdefault(problem.reason, problem)
    return [f"{place(row.source, row.line)}: {visible(row.detail, 200)}" for row in first.values() if row.detail]


def _places(first: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Places of rows, the file named only where it changes: `a.jsonl:3`, `7`, `b.jsonl:1`."""
    last = None
    for row in first:
        yield str(row["line"]) if row["source"] == last and row["line"] else place(row["source"], row["line"])
        last = row["source"]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.2g} %" if 0 < part < 0.01 * whole else f"{100 * part / max(1, whole):.1f} %"


def _ratio_that_allows(part: int, whole: int) -> float:
    return math.ceil(100 * part / whole) / 100


# Lengths -----------------------------------------------------------------------------------------------------------


class Bin(NamedTuple):
    """How many rows have `low` to `high` tokens, both included."""

    low: int
    high: int
    rows: int


def histogram(lengths: Sequence[int]) -> list[Bin]:
    """At most ten bins of one round width (1, 2 or 5 times a power of ten) that cover all lengths."""
    low, high = min(lengths), max(lengths)
    width = next(
        width
        for exponent in range(20)
        for width in (10**exponent, 2 * 10**exponent, 5 * 10**exponent)
        if high // width - low // width < NUM_BINS
    )
    counts = [0] * (high // width - low // width + 1)
    for length in lengths:
        counts[length // width - low // width] += 1
    return [Bin(start := (low // width + i) * width, start + width - 1, count) for i, count in enumerate(counts)]


def draw(bins: Sequence[Bin], width: int, block: str = "█") -> Iterator[str]:
    """One line per bin: its range, a bar, its rows; no line is longer than `width`."""
    labels = [f"{bin.low:,}–{bin.high:,}" if bin.high > bin.low else f"{bin.low:,}" for bin in bins]
    counts = [f"{bin.rows:,}" for bin in bins]
    most = max(bin.rows for bin in bins)
    label_width, count_width = max(map(len, labels)), max(map(len, counts))
    room = max(1, min(50, width - label_width - count_width - 2))
    for bin, label, count in zip(bins, labels, counts):
        bar = block * max(bin.rows > 0, round(room * bin.rows / most))
        yield f"{label:>{label_width}} {count:>{count_width}} {bar}".rstrip()


def _shape(console: "Console | None") -> tuple[int, str]:
    """Width to draw in, and what to draw with: a stream that is not UTF-8 has no blocks."""
    if console is None:
        return 80, "█"
    return console.width, "█" if console.encoding.lower().startswith("utf") else "#"


# Preview -----------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Neighbouring tokens that are treated alike."""

    text: str
    trained: bool
    weight: float
    special: bool


def preview(
    token_rows: Sequence[Mapping[str, Any]], tokenizer: Any, console: "Console | None" = None, rows: int = 3
) -> str | None:
    """Show what the loss covers in the first rows, decoded from the very tokens that train.

    On a colour terminal trained text is bold green, special tokens are magenta (reverse where trained), the rest is
    dim. Elsewhere trained text stands in ⟦ ⟧. A weight other than 1 is written in front, as ×0.5. Long stretches are
    shortened in the middle; nothing in a text can move the cursor or turn the reading direction.

    Returns: the text with marks when no console is given, else None after printing.
    """
    coloured = console is not None and console.is_terminal and not console.no_color
    parts: list[Text | str] = []
    for number, row in enumerate(token_rows[:rows], 1):
        runs = _shorten(_runs(row, tokenizer))
        num_trained = count_trained(row["labels"])
        title = f"── example {number}: {_count(len(row['input_ids']), 'token')}, {num_trained:,} trained"
        if coloured:
            console.print(_styled(title, runs), soft_wrap=True)
        else:
            parts.append(f"{title}\n{_marked(runs)}")
    text = "\n".join(parts)
    if console is None:
        return text
    if not coloured:
        console.out(text, highlight=False)
    return None


def first_row_lines(dataset: Iterable[Mapping[str, Any]], tokenizer: Any) -> list[str]:
    """The first row as ids and as text: `input_ids:`, `inputs:`, `label_ids:`, `labels:`, and what other ids it has.

    Masked labels are left out of the text. Characters that a terminal would act on are written as escapes.
    """
    lines = []
    for name, ids in next(iter(dataset), {}).items():
        if name != "labels" and not name.endswith("_ids"):
            continue
        kind = "label" if name == "labels" else name.removesuffix("_ids")
        numbers = [int(id) for id in ids]
        shown = [id for id in numbers if id != IGNORE_INDEX]
        text = visible(_decode_range(tokenizer, shown, 0, len(shown)), keep="\n")
        title = {"input": "inputs", "label": "labels"}.get(kind, kind)
        lines += [f"{kind}_ids:", str(numbers), f"{title}:", *text.split("\n")]
    return lines


def _runs(row: Mapping[str, Any], tokenizer: Any) -> list[Run]:
    """Neighbours of the same label state, weight and kind, decoded together so that multi-byte characters survive."""
    ids, labels = row["input_ids"], row["labels"]
    weights = row.get("weights") or [1.0] * len(ids)
    specials = _special_ids(tokenizer)
    trained = [place > 0 and label != IGNORE_INDEX for place, label in enumerate(labels)]  # as `count_trained` counts
    states = [
        (is_trained, weight if is_trained else 1.0, id in specials)
        for id, is_trained, weight in zip(ids, trained, weights)
    ]
    runs, start = [], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or states[end] != states[start]:
            runs.append(Run(_decode_range(tokenizer, ids, start, end), *states[start]))
            start = end
    return runs


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return set(tokenizer.all_special_ids) | {id for id, token in added.items() if getattr(token, "special", False)}


def _decode_range(tokenizer: Any, ids: Sequence[int], start: int, end: int) -> str:
    """The text that tokens start to end add. Decoded alone, SentencePiece would take off their leading space."""

    def decode(some: Sequence[int]) -> str:
        return tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    before = decode(ids[max(0, start - 8) : start])
    both = decode(ids[max(0, start - 8) : end])
    return both[len(before) :] if both.startswith(before) else decode(ids[start:end])


def _shorten(runs: list[Run]) -> list[Run]:
    """Long stretches without their middle, and rows of many stretches (packed ones) without theirs."""
    half = MAX_RUN_CHARACTERS // 2
    short = [
        run._replace(text=f"{run.text[:half]} ⋯ {len(run.text) - 2 * half:,} characters ⋯ {run.text[-half:]}")
        if len(run.text) > MAX_RUN_CHARACTERS + 40
        else run
        for run in runs
    ]
    if len(short) > MAX_RUNS:
        gap = Run(f"\n⋯ {len(short) - MAX_RUNS:,} stretches ⋯\n", False, 1.0, False)
        short = [*short[: MAX_RUNS // 2], gap, *short[-MAX_RUNS // 2 :]]
    return short


def _marked(runs: Iterable[Run]) -> str:
    """Plain marks around trained text, special tokens with the text that they end; marks in the text are escaped."""
    text, inside = [], None
    for run in runs:
        state = run.weight if run.trained else None
        if state != inside:
            text.append("⟧" * (inside is not None))
            text.append("" if state is None else "⟦" if state == 1 else f"⟦×{state:g} ")
            inside = state
        text.append(visible(run.text, keep="\n").replace("⟦", "\\u27e6").replace("⟧", "\\u27e7"))
    return "".join(text) + "⟧" * (inside is not None)


def _styled(title: str, runs: Iterable[Run]) -> "Text":
    from rich.text import Text

    text = Text(f"{title}\n")
    weight = 1.0
    for run in runs:
        if run.trained and run.weight not in (weight, 1):
            text.append(f"×{run.weight:g}", "yellow")
        weight = run.weight
        style = {
            (True, True): "bold magenta reverse",
            (True, False): "bold green",
            (False, True): "magenta",
            (False, False): "dim",
        }[run.trained, run.special]
        text.append(visible(run.text, keep="\n"), style)
    return text
