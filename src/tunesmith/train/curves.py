"""The trainer's log → pictures: training_loss.png, and training_eval_loss.png where there were evaluations."""

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

TRAINING_FILE, HELD_OUT_FILE = "training_loss.png", "training_eval_loss.png"
TRAINING, HELD_OUT = "#1f5a87", ("#d1495b", "#3d8f66", "#8a5fb0", "#b8860b", "#4a7d8c", "#7a4b3a")
PALE = "#9db4c8"
AVERAGED_FROM = 8  # points
PER_TOKEN = "nats per trained token"
EVAL_LOSS = re.compile(r"eval_(?:(?P<name>.+)_)?loss")

Points = list[tuple[int, float]]


def plot_curves(
    log_history: Sequence[Mapping[str, Any]], folder: str | Path, title: str = "Loss", unit: str = PER_TOKEN
) -> list[Path]:
    """Draw the losses over optimizer steps, each logged value and its moving average, as PNG files in `folder`.

    Args:
        log_history: what `trainer.state.log_history` holds, or `read_metrics` returns.
        folder: where the pictures go; both are replaced whole.
        title: one line over the pictures.
        unit: of the loss, beside its axis.

    Returns: the files written; none, with a warning in the log, when no loss was logged.
    """
    training, held_out = losses(log_history, "loss"), held_out_losses(log_history)
    paths = []
    if training:
        paths.append(_picture(Path(folder) / TRAINING_FILE, title, unit, training, held_out))
    if held_out:
        paths.append(_picture(Path(folder) / HELD_OUT_FILE, f"{title}, held out", unit, [], held_out))
    if not paths:
        logger.warning("No loss was logged, so no curve is drawn in %s. Lower logging_steps to log sooner.", folder)
    return paths


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average that grows calmer with the number of values: weight 1.8 · (sigmoid(n / 20) − 0.5)."""
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * len(values))) - 0.5)
    smoothed: list[float] = []
    for value in values:
        last = smoothed[-1] if smoothed else value
        smoothed.append(weight * last + (1 - weight) * value)
    return smoothed


def losses(log_history: Sequence[Mapping[str, Any]], key: str) -> Points:
    """(step, loss) of every log that has a finite one."""
    points = [(int(row["step"]), float(row[key])) for row in log_history if key in row and "step" in row]
    return [(step, loss) for step, loss in points if math.isfinite(loss)]


def held_out_losses(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """The losses of each evaluation set, by name; the only one of a run has the name ''."""
    keys = {key: match["name"] or "" for row in log_history for key in row if (match := EVAL_LOSS.fullmatch(key))}
    return {name: points for key, name in keys.items() if (points := losses(log_history, key))}


def _picture(path: Path, title: str, unit: str, training: Points, held_out: Mapping[str, Points]) -> Path:
    """One figure, staged beside its place and renamed."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no window system

    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if training:
        _draw(axes, training, "training", TRAINING, PALE)
    for number, (name, points) in enumerate(held_out.items()):
        colour = HELD_OUT[number % len(HELD_OUT)]
        label = f"held out{name and f': {name}'}"
        if training:
            axes.plot(*zip(*points), color=colour, linewidth=1.6, marker="o", markersize=5, label=_last(label, points))
        else:
            _draw(axes, points, label, colour, colour)
    _draw_axes(axes, [value for points in (training, *held_out.values()) for _, value in points], title, unit)
    columns = 3 if len(axes.get_lines()) <= 3 else 2
    figure.legend(loc="outside lower left", ncols=columns, fontsize=9, edgecolor="none")  # outside it hides no point
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(staged, format="png")
    os.replace(staged, path)
    return path


def _draw(axes: "Axes", points: Points, label: str, colour: str, pale: str) -> None:
    """Every logged loss in a pale colour, the moving average over it; of a few points there is nothing to average."""
    steps, values = zip(*points)
    dots = {"marker": ".", "markersize": 5} if len(steps) <= 200 else {}
    if len(steps) < AVERAGED_FROM:
        axes.plot(steps, values, color=colour, linewidth=1.6, label=_last(label, points), zorder=2, **dots)
        return
    axes.plot(steps, values, color=pale, linewidth=0.8, alpha=0.7, label=label, zorder=2, **dots)
    smoothed = smooth(values)
    averaged = _last(f"{label}, moving average", list(zip(steps, smoothed)))
    axes.plot(steps, smoothed, color=colour, linewidth=2, label=averaged, zorder=3)


def _last(label: str, points: Points) -> str:
    return f"{label} (last {points[-1][1]:.3g})"


def _draw_axes(axes: "Axes", values: list[float], title: str, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    # From zero where the curve comes near it; else from just below the lowest point, or a small change would not show.
    axes.set_ylim(0 if 0 <= low < 0.4 * high else low - margin, high + margin)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10], integer=True))
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"loss ({unit})")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
