"""What a person reads before and after training: the rows, the answers, the figures, and what to type next."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tunesmith.data.report import Report
from tunesmith.evaluate.predict import Comparison, before_after_table
from tunesmith.model.value_head import has_head
from tunesmith.recipe import Phases
from tunesmith.runs import ALL_RESULTS_FILE, PREDICTIONS_FILE

# Figures of the last lines: key, what it is called, how it is written.
FIGURES = (
    ("loss", "loss", "{:.3f}"),
    ("mean_token_accuracy", "token accuracy", "{:.1%}"),
    ("accuracy", "pairs told apart", "{:.1%}"),
    ("bleu-4", "BLEU-4", "{:.1f}"),
    ("rouge-l", "ROUGE-L", "{:.1f}"),
)

MEMORY_PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "libraries", "allocator")
"""Lines of the memory table, in this order."""


def show_reports(report: Report | None, held_out: Mapping[str, Report], console: Console) -> None:
    """The report of each set."""
    if report is not None:
        report.table(console)
    for name, one in held_out.items():
        console.out(f"held out{name and f' ({name})'}:", highlight=False)
        one.table(console)


def show_answers(
    shown: Sequence[Comparison],
    compared: int,
    before: Mapping[str, float],
    after: Mapping[str, float],
    console: Console,
) -> None:
    """A few held-out prompts with what the model answered before and after training."""
    console.out(f"{compared} held-out prompts answered before and after training, {len(shown)} of them:")
    before_after_table(shown, console, before, after)


def show_results(
    folder: Path, figures: Mapping[str, Any], phases: Phases, sets: Sequence[str], kind: str, console: Console
) -> None:
    """The end of the output: figures, where everything lies, what to type next.

    Args:
        folder: the run directory.
        figures: as in `all_results.json`.
        phases: those that ran.
        sets: names of the evaluation sets; "" is the only one.
        kind: "adapter" or "model": what was trained.
    """
    lines = [training_line(figures)] if phases.train else []
    lines += figure_lines(figures, "eval", sets) + figure_lines(figures, "predict", [""])
    if phases.train:
        lines.append(f"{kind + ':':12}{folder}")
    lines += [f"{'loss curve:':12}{folder / name}" for name in ("training_loss.png",) if (folder / name).is_file()]
    if phases.predict:
        lines.append(f"{'answers:':12}{folder / PREDICTIONS_FILE}")
    lines.append(f"{'figures:':12}{folder / ALL_RESULTS_FILE}")
    if phases.train:
        named = shlex.quote(str(folder))
        use = f"eval {named} --eval_dataset FILE" if has_head(folder) else f"chat {named}"
        lines.append(f"{'next:':12}{own_command()} {use}")
    for line in lines:
        console.out(line, highlight=False)


KEPT_CHECKPOINTS = 2


def memory_lines(figures: Mapping[str, Any]) -> list[str]:
    """The estimated memory of a step as a small table, and what helps where this machine has less.

    Args:
        figures: as `check --json` has them under `memory`, in bytes; or the `reason` why there are none.
    """
    if "reason" in figures:
        return [f"memory: not estimated ({figures['reason']})"]
    checkpointing = "checkpointing" if figures["gradient_checkpointing"] else "no checkpointing"
    lines = [
        f"memory at the peak of a step, estimated: {figures['tokens']:,} tokens in the largest micro-batch, "
        f"{figures['products']} products, {checkpointing}"
    ]
    lines += [f"  {name:12}{size_text(figures[name]):>9}" for name in MEMORY_PARTS if figures[name]]
    total, usable = figures["total"], figures["usable"]
    has = "" if usable is None else f" of {size_text(usable)} that this machine has for it"
    lines.append(f"  {'total':12}{size_text(total):>9}{has}")
    if total < sum(figures[name] for name in MEMORY_PARTS):
        lines.append("  (activations go as gradients come, so the total counts the larger of the two)")
    if usable is not None and total > usable:
        ways = [f"{name} ({size_text(size)})" for name, size in figures["helps"].items()]
        lines.append("memory: it does not fit. " + (f"Each of these helps: {', '.join(ways)}." if ways else ""))
    checkpoint, free = figures["checkpoint"], figures["free_disk"]
    lines.append(f"disk: a checkpoint takes about {size_text(checkpoint)}, and {size_text(free)} are free")
    if free < KEPT_CHECKPOINTS * checkpoint:
        lines.append(
            f"disk: {KEPT_CHECKPOINTS} checkpoints do not fit, the last and the one being written. Make room, choose "
            "another output_dir, or set adapter: lora."
        )
    return lines


def size_text(size: float) -> str:
    """Bytes in the unit that suits them.

    >>> size_text(5.4e8), size_text(1.2e6)
    ('0.54 GB', '1.20 MB')
    """
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def training_line(figures: Mapping[str, Any]) -> str:
    """Time, tokens and speed of the training."""
    time, tokens = clock_text(figures["train_runtime"]), f"{figures['train_tokens']:,} tokens"
    speed = f"{figures['train_tokens_per_second']:,.0f} tokens/s"
    if mfu := figures.get("train_mfu"):
        speed += f", MFU {share_text(mfu)} of a measured {flops_text(figures['peak_flops_per_second'])}"
    if step := figures.get("train_resumed_at_step"):
        return f"trained on from step {step} in {time}: {tokens} in all, {speed}"
    return f"trained in {time}: {tokens}, {speed}"


def share_text(share: float) -> str:
    """A share in percent, with digits where there is little.

    >>> share_text(0.413), share_text(0.0009)
    ('41 %', '0.09 %')
    """
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.2f} %"


def flops_text(rate: float) -> str:
    """Operations a second in the unit that suits them.

    >>> flops_text(2.4e12), flops_text(2.8e11)
    ('2.4 TFLOP/s', '280 GFLOP/s')
    """
    return f"{rate / 1e12:.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.0f} GFLOP/s"


def figure_lines(figures: Mapping[str, Any], phase: str, sets: Sequence[str]) -> list[str]:
    """`held-out loss 1.234, token accuracy 61.0%` for each evaluation set of a phase."""
    word = {"eval": "held-out", "predict": "predicted"}[phase]
    lines = []
    for name in sets:
        prefix = f"{phase}_{name}_" if name else f"{phase}_"
        found = [(figures.get(prefix + figure), label, form) for figure, label, form in FIGURES]
        if parts := [f"{label} {form.format(value)}" for value, label, form in found if isinstance(value, float)]:
            lines.append(f"{word}{name and f' ({name})'} {', '.join(parts)}")
    return lines


def own_command() -> str:
    """What to type for this program here: its name, or its path where the shell would not find the name."""
    called = Path(sys.argv[0])
    if called.name != "tunesmith":
        return "python -m tunesmith"
    return "tunesmith" if shutil.which("tunesmith") else shlex.quote(os.path.relpath(called))


def clock_text(seconds: float, hours: bool = False) -> str:
    """Seconds as `m:ss`, or `h:mm:ss` from an hour on or when `hours` is set.

    >>> clock_text(35), clock_text(3_725), clock_text(35, hours=True)
    ('0:35', '1:02:05', '0:00:35')
    """
    minutes, second = divmod(max(0, round(seconds)), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour or hours else f"{minute}:{second:02d}"
