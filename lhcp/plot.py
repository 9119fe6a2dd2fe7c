"""The loss curve of a run as a picture. Imports no torch; needs matplotlib (`pip install 'lhcp[plot]'`)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lhcp import metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STAGE_COLOURS = {"lighthouse": "#fdf3da", "dense": "#e6edf6"}
_LOSS, _REFERENCE, _TEXT = "#1f4e8c", "#707070", "#333333"
_HELD_OUT = {
    metrics.HELD_OUT: ("held-out", "#c8501e"),
    f"{metrics.HELD_OUT}_lighthouse": ("held-out, lighthouse", "#2e8b57"),
}
"""Events that are drawn: what they are called there, and their colour."""
_LABEL_SPACING = 0.05
"""Least distance between labels, as a share of the height."""


class _Label(NamedTuple):
    """Text beside the plot, at the height of what it names."""

    y: float
    text: str
    colour: str


def plot_loss(run_dir: Path, *, references: Mapping[str, float] | None = None) -> Path | None:
    """Draw `run_dir`/loss.png from the run's metrics.

    Args:
        run_dir: the run folder, with `metrics.jsonl` and, for held-out losses, `events.jsonl`.
        references: horizontal lines to compare with, name to loss in nats per token.

    Returns:
        The picture's path; None, after a line on stdout, when matplotlib is not installed.

    Raises:
        FileNotFoundError: when the run has no metrics.
        ValueError: when no step has a finite loss.
    """
    try:
        # Not pyplot: it keeps global state, and looks for a display.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no loss.png: it needs matplotlib (pip install matplotlib)")
        return None
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = metrics.read_metrics(run_dir)
    labels = [*_draw_loss(axes, steps), *_draw_held_out(axes, run_dir)]
    labels += _draw_references(axes, references or {})
    _draw_stages(axes, steps)
    _dress(axes, labels)
    path = run_dir / "loss.png"
    figure.savefig(path)
    return path


def _draw_loss(axes: Axes, steps: Sequence[Mapping[str, Any]]) -> list[_Label]:
    finite = sum(record["loss"] is not None for record in steps)
    if not finite:
        raise ValueError("no step has a finite loss")
    last = math.nan
    # About 1/40 of the run, and never across a change of stage: the spike there is what one looks for.
    reach = finite // 80
    for number, (x, y) in enumerate(_curves(steps)):
        axes.plot(x, y, color=_LOSS, linewidth=0.8, alpha=0.3 if reach else 1)
        smooth = _smoothed(y, reach, first=number == 0)
        last = next((value for value in reversed(smooth) if math.isfinite(value)), last)
        axes.plot(x, smooth, color=_LOSS, linewidth=2, marker="o" if len(x) == 1 else None, clip_on=False)
    return [_Label(last, "training", _LOSS)]


def _curves(steps: Sequence[Mapping[str, Any]]) -> list[tuple[list[int], list[float]]]:
    """The loss of each stage: steps done, and NaN (a gap in the curve) where it was not finite."""
    curves = []
    for _, group in itertools.groupby(steps, key=lambda record: record["stage"]):
        stage = list(group)
        y = [math.nan if record["loss"] is None else record["loss"] for record in stage]
        curves.append(([record["step"] + 1 for record in stage], y))
    return curves


def _smoothed(y: Sequence[float], reach: int, *, first: bool) -> list[float]:
    """Mean over the finite values at most `reach` away.

    At the ends of a stage the window shrinks on one side, so that its first and last values are means as well; at
    the start of the run on both, so that the steep first descent is not flattened.
    """
    result = []
    for i in range(len(y)):
        near = min(reach, i) if first else reach
        window = [value for value in y[max(0, i - near) : i + near + 1] if math.isfinite(value)]
        result.append(sum(window) / len(window) if window else math.nan)
    return result


def _draw_held_out(axes: Axes, run_dir: Path) -> list[_Label]:
    if not (run_dir / metrics.EVENTS_FILE).exists():
        return []
    events = metrics.read_events(run_dir)
    labels = []
    for name, (text, colour) in _HELD_OUT.items():
        points = [(e["step"] + 1, e["loss"]) for e in events if e["event"] == name and e["loss"] is not None]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        size = 6 if len(points) <= 20 else 3.5
        (marks,) = axes.plot(x, y, "o", color=colour, markersize=size, zorder=5, clip_on=False)
        marks.set(markeredgecolor="white", markeredgewidth=size / 6)
        labels.append(_Label(y[-1], text, colour))
    return labels


def _draw_references(axes: Axes, references: Mapping[str, float]) -> list[_Label]:
    for loss in references.values():
        axes.axhline(loss, color=_REFERENCE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    return [_Label(loss, name, _REFERENCE) for name, loss in references.items()]


def _draw_stages(axes: Axes, steps: Sequence[Mapping[str, Any]]) -> None:
    for stage, group in itertools.groupby(steps, key=lambda record: record["stage"]):
        numbers = [record["step"] for record in group]
        left, right = numbers[0], numbers[-1] + 1
        axes.axvspan(left, right, color=_STAGE_COLOURS.get(stage, "#eeeeee"), linewidth=0, zorder=0)
        axes.annotate(
            stage,
            xy=((left + right) / 2, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, -6),
            textcoords="offset points",
            ha="center",
            va="top",
            color=_TEXT,
        )
    axes.set_xlim(steps[0]["step"], steps[-1]["step"] + 1)


def _dress(axes: Axes, labels: Sequence[_Label]) -> None:
    axes.set_title("lhcp: loss", loc="left", fontsize=13, color=_TEXT)
    axes.set_xlabel("step", color=_TEXT)
    axes.set_ylabel("loss (nats per token)", color=_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=_TEXT)
    axes.locator_params(axis="x", integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color="white", linewidth=1)
    axes.set_axisbelow(True)
    axes.margins(y=0.08)
    axes.autoscale_view(scalex=False)
    bottom, top = axes.get_ylim()
    heights = [(label.y - bottom) / (top - bottom) for label in labels]
    for label, height in zip(labels, _spread(heights), strict=True):
        axes.annotate(
            f"{label.text} {label.y:.2f}",
            xy=(1, height),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=label.colour,
            annotation_clip=False,
        )


def _spread(heights: Sequence[float]) -> list[float]:
    """`heights` moved as little as needed to be `_LABEL_SPACING` apart, in the same order."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _bottom(groups[-1], heights) - _top(groups[-2], heights) < _LABEL_SPACING:
            last = groups.pop()
            groups[-1].extend(last)
    placed = [0.0] * len(heights)
    for group in groups:
        for position, index in enumerate(group):
            placed[index] = _bottom(group, heights) + position * _LABEL_SPACING
    return placed


def _bottom(group: Sequence[int], heights: Sequence[float]) -> float:
    """Lowest place of a group of touching labels, centred on the mean of where they belong."""
    return sum(heights[i] for i in group) / len(group) - (len(group) - 1) / 2 * _LABEL_SPACING


def _top(group: Sequence[int], heights: Sequence[float]) -> float:
    return _bottom(group, heights) + (len(group) - 1) * _LABEL_SPACING
