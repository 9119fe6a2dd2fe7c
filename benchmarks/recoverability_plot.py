"""Pictures of a recoverability report: loss curves, the switch, and what each arm ends with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.arms import grouped, is_dense, less_dense, without_seed
from benchmarks.common import Record
from lhcp.eval.report import plot_passkeys

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#c8501e", "#2e8b57", "#7b5ea7", "#b8860b", "#008b8b", "#a0526d")
_DENSE, _TEXT = "#1f4e8c", "#333333"
_BEFORE, _AFTER = 20, 100
"""Steps around the switch that are drawn."""


def plot(arms: Mapping[str, Record], folder: Path) -> list[Path]:
    """Draw `recoverability.png` and, where arms have them, `arms.png` and `passkeys.png`; nothing without matplotlib.

    Args:
        arms: by name.
        folder: for the pictures.
    """
    try:
        # Not pyplot: it keeps global state, and looks for a display.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []
    paths = []
    if curves := _main_arms(arms):
        figure = Figure(figsize=(13, 4.2), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        by_step, at_switch, by_time = figure.subplots(1, 3)
        _draw(by_step, curves, "loss by step", "step", _steps)
        _draw_switch(at_switch, curves)
        _draw(by_time, curves, "loss by time", "minutes, each step at the median of its stage", _minutes)
        handles, labels = by_step.get_legend_handles_labels()
        by_step.legend(handles, labels, frameon=False, fontsize=9, title="one line a seed", title_fontsize=9)
        for switch in sorted({arm["switch"] for group in curves.values() for arm in group if arm["switch"]}):
            by_step.axvline(switch + 0.5, color="#999999", linewidth=0.8, zorder=0)
        by_step.set_ylabel("training loss (nats per token)", color=_TEXT)
        paths.append(folder / "recoverability.png")
        figure.savefig(paths[-1])
    groups = grouped(arms)
    every = [arm for group in groups.values() for arm in group]
    less = {name: less_dense(group, every) for name, group in groups.items() if not is_dense(group[0])}
    less = {name: values for name, values in less.items() if values}
    if len(less) > 1:
        figure = Figure(figsize=(7, 1.2 + 0.32 * len(less)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        _draw_less(figure.subplots(), less)
        paths.append(folder / "arms.png")
        figure.savefig(paths[-1])
    found = {name: arm["passkeys"] for name, arm in arms.items() if arm["passkeys"]}
    if found and plot_passkeys(found, folder / "passkeys.png"):
        paths.append(folder / "passkeys.png")
    return paths


def _main_arms(arms: Mapping[str, Record]) -> dict[str, list[Record]]:
    """Those that were run with several seeds, if any were, dense first: what was tried once would hide them."""
    groups: dict[str, list[Record]] = {}
    for name, arm in arms.items():
        groups.setdefault(without_seed(name), []).append(arm)
    several = {name: group for name, group in groups.items() if len(group) > 1}
    return dict(sorted((several or groups).items(), key=lambda item: not is_dense(item[1][0])))


def _coloured(groups: Mapping[str, list[Record]]) -> list[tuple[str, str, list[Record]]]:
    colours = iter(_COLOURS * len(groups))
    return [(name, _DENSE if is_dense(group[0]) else next(colours), group) for name, group in groups.items()]


def _draw(axes: Axes, groups: Mapping[str, list[Record]], title: str, unit: str, x_of: Any) -> None:
    """One line a run, smoothed over a hundredth of it; the upper end cut off, where the first steps are."""
    lowest, upper = math.inf, -math.inf
    for name, colour, group in _coloured(groups):
        for number, arm in enumerate(group):
            every, values = arm["curve"]["every"], arm["curve"]["loss"]
            smooth = _smoothed([math.nan if value is None else value for value in values], len(values) // 200)
            axes.plot(x_of(arm, every, len(smooth)), smooth, color=colour, linewidth=1.1, alpha=0.85,
                      label=None if number else name)  # fmt: skip
            lowest = min([lowest, *(value for value in smooth if math.isfinite(value))])
            later = [value for value in smooth[len(smooth) // 20 :] if math.isfinite(value)]
            upper = max([upper, *later])
    if math.isfinite(lowest) and upper > lowest:
        axes.set_ylim(lowest - 0.03 * (upper - lowest), upper)
    _dress(axes, title, unit)


def _steps(arm: Mapping[str, Any], every: int, count: int) -> list[float]:
    return [min((i + 1) * every, arm["steps"]) for i in range(count)]


def _minutes(arm: Mapping[str, Any], every: int, count: int) -> list[float]:
    """When each point was reached, every step at the median of its stage."""
    each = [seconds or 0.0 for seconds, stage in zip(arm["seconds_per_step"], arm["stages"], strict=True)
            for _ in range(stage["steps"])]  # fmt: skip
    ends = list(accumulate(each))
    return [ends[min((i + 1) * every, arm["steps"]) - 1] / 60 for i in range(count)]


def _draw_switch(axes: Axes, groups: Mapping[str, list[Record]]) -> None:
    """Step by step, minus the loss before the switch; the steps before it as far as the curve is not thinned."""
    for name, colour, group in _coloured(groups):
        for number, arm in enumerate(group):
            if arm["loss_before"] is None or not arm["after_switch"]:
                continue
            curve, first = arm["curve"], arm["switch"]
            before = curve["loss"][max(0, first - _BEFORE) : first] if curve["every"] == 1 else []
            y = [math.nan if value is None else value - arm["loss_before"]
                 for value in [*before, *arm["after_switch"][:_AFTER]]]  # fmt: skip
            x = range(-len(before) + 1, len(y) - len(before) + 1)
            axes.plot(x, y, color=colour, linewidth=1.1, alpha=0.85, label=None if number else name)
    axes.axhline(0, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.axvline(0.5, color="#999999", linewidth=0.8)
    _dress(axes, "Lighthouse | dense", "steps after the switch")
    axes.set_ylabel("training loss minus that before the switch", color=_TEXT)


def _draw_less(axes: Axes, less: Mapping[str, Sequence[float]]) -> None:
    """What each arm ends with, minus dense from scratch with the same seed: a point a seed."""
    axes.axvline(0, color=_DENSE, linewidth=1)
    order = sorted(less, key=lambda name: fmean(less[name]), reverse=True)
    for y, name in enumerate(order):
        axes.plot(less[name], [y] * len(less[name]), "o", color=_COLOURS[0], markersize=5, alpha=0.8)
        if len(less[name]) > 1:
            axes.plot([min(less[name]), max(less[name])], [y, y], color=_COLOURS[0], linewidth=1)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(-0.6, len(order) - 0.4)
    _dress(axes, "held-out loss minus that of dense from scratch, a point a seed", "nats per token: better < 0 < worse")
    axes.grid(axis="x", color="#eeeeee", linewidth=0.8)


def _smoothed(y: Sequence[float], reach: int) -> list[float]:
    """Mean over the finite values at most `reach` away, fewer at the start so that the descent is not flattened."""
    result = []
    for i in range(len(y)):
        near = min(reach, i)
        window = [value for value in y[i - near : i + near + 1] if math.isfinite(value)]
        result.append(fmean(window) if window else math.nan)
    return result


def _dress(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_TEXT)
    axes.set_xlabel(unit, color=_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=_TEXT)
    axes.set_axisbelow(True)
