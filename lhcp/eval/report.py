"""The result of an evaluation: on the terminal, as JSON, and for passkeys as a picture. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]
Shares = dict[float, dict[int, float]]
"""Of the prompts that were answered rightly, by depth and context."""


def show(result: Record) -> None:
    """Print it."""
    trained = "an imported model" if result["stage"] is None else f"after {result['step']:,} steps"
    console = Console()
    console.print(f"{result['checkpoint']} ({trained}), {_on(result['environment'])}", soft_wrap=True, highlight=False)
    console.print(_losses(result["rows"]) if result["task"] == "loss" else _passkeys(result["rows"]))


def write(result: Record, out: Path) -> list[Path]:
    """Leave it in a folder, which is made if needed: `TASK.json`, and `passkey.png` where matplotlib is installed.

    Returns:
        The files.

    Raises:
        OSError: they cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{result['task']}.json"
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    if result["task"] == "loss":
        return [path]
    panels = {}
    for mode in _modes(result["rows"]):
        mine = [row for row in result["rows"] if row["mode"] == mode]
        short = [_short(length) for length in dict.fromkeys(r["length"] for r in mine if r["attended"] != mode)]
        panels[mode + (f" ({', '.join(short)}: dense)" if short else "")] = shares(mine)
    picture = plot_passkeys(panels, out / "passkey.png")
    return [path, picture] if picture else [path]


def shares(rows: Iterable[Record]) -> Shares:
    """Of the passkeys of one mode, by depth and context."""
    table: Shares = {}
    for row in rows:
        table.setdefault(row["depth"], {})[row["length"]] = row["found"] / row["samples"]
    return table


def mean(table: Shares) -> float:
    """Over all depths and contexts, each counted once."""
    return fmean(share for row in table.values() for share in row.values())


def _on(environment: Record) -> str:
    ranks = environment["dp"] * environment["cp"]
    return f"{ranks} x {environment['device']}, {environment['dtype']}"


def _modes(rows: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(row["mode"] for row in rows))


def _note(row: Record) -> str:
    return "" if row["attended"] == row["mode"] else f", too short for it: {row['attended']}"


def _losses(rows: Sequence[Record]) -> Table:
    table = Table(title="held-out loss, nats per token")
    for name in ("mode", "tokens a sequence", "sequences", "loss"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for row in rows:
        table.add_row(row["mode"] + _note(row), f"{row['length']:,}", f"{row['samples']:,}", f"{row['loss']:.4f}")
    return table


def _passkeys(rows: Sequence[Record]) -> Table:
    contexts = list(dict.fromkeys(row["length"] for row in rows))
    table = Table(title=f"passkeys found, of {rows[0]['samples']} each; chance is 10%")
    table.add_column("mode")
    table.add_column("depth", justify="right")
    for context in contexts:
        table.add_column(f"{context:,}", justify="right")
    for mode in _modes(rows):
        mine = [row for row in rows if row["mode"] == mode]
        found = shares(mine)
        for number, (depth, row) in enumerate(found.items()):
            cells = [f"{row[context]:.0%}" for context in contexts]
            table.add_row("" if number else mode, f"{depth:g}%", *cells)
        means = [f"{fmean(row[context] for row in found.values()):.0%}" for context in contexts]
        table.add_row("", "mean", *means, style="bold", end_section=True)
        if short := [row for row in mine if row["attended"] != mode]:
            lengths = ", ".join(f"{length:,}" for length in dict.fromkeys(row["length"] for row in short))
            table.caption = f"too short for {mode}, attended densely: {lengths}"
    return table


def plot_passkeys(panels: Mapping[str, Shares], path: Path) -> Path | None:
    """Draw how many passkeys were found, one panel each of the same depths and contexts; None without matplotlib."""
    try:
        # Not pyplot: it keeps global state, and looks for a display.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: it needs matplotlib (pip install matplotlib)")
        return None
    contexts = len(next(iter(next(iter(panels.values())).values())))
    figure = Figure(figsize=(1.4 + (0.9 + 0.62 * max(3, contexts)) * len(panels), 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, table) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _panel(axes, f"{title}, mean {mean(table):.0%}", table)
    figure.suptitle("passkeys found; chance is 10%", fontsize=11, color="#333333")
    figure.supxlabel("tokens of context", fontsize=10, color="#333333")
    figure.supylabel("depth (0%: at the start)", fontsize=10, color="#333333")
    figure.savefig(path)
    return path


def _panel(axes: Axes, title: str, table: Shares) -> None:
    depths, contexts = list(table), list(next(iter(table.values())))
    values = [[table[depth][context] for context in contexts] for depth in depths]
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, row in enumerate(values):
        for x, share in enumerate(row):
            axes.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=8,
                      color="white" if share > 0.6 else "#333333")  # fmt: skip
    axes.set_title(title, fontsize=10, color="#333333")
    axes.set_xticks(range(len(contexts)), [_short(context) for context in contexts])
    axes.set_yticks(range(len(depths)), [f"{depth:g}%" for depth in depths])
    axes.set_xticks([x - 0.5 for x in range(1, len(contexts))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(depths))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0, labelsize=8, colors="#333333")
    axes.spines[:].set_visible(False)


def _short(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else f"{count:,}"
