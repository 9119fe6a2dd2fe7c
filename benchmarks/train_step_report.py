"""Results of `benchmarks.train_step`, merged into a table and a picture.

    python -m benchmarks.train_step_report RESULT.json ... --out NAME

writes NAME.md and NAME.png (which needs matplotlib). Exit codes: 0 done, 2 something that the user can correct.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import train_step
from benchmarks.common import Record, document, setting, table, write_text
from benchmarks.step_parts import PARTS
from lhcp.config import ConfigError, RunConfig
from lhcp.config.validation import validate
from lhcp.metrics import tell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADER = ["run", "N", "S", *train_step.HEADER]
COLORS = dict(
    zip(
        PARTS,
        ["#c8501e", "#e8a33d", "#1f4e8c", "#5b8db8", "#2e7d5b", "#7b4b94", "#a9b7c6", "#dddddd"],
        strict=True,
    )
)
NOTES = (
    "Parts are milliseconds on the GPU's compute stream, of a profiled step; the step is the median of others.",
    "Loss: with the products of the output head. Other: norms, RoPE, SwiGLU, residuals.",
    "MFU: of the data sheet's dense bfloat16 peak; what is computed again does not count.",
    "GPU GiB: the peak of tensors; host GiB: pinned for layers' inputs.",
)
Named = tuple[str, Record]


def main(argv: Sequence[str] | None = None) -> int:
    """Read and write; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.train_step_report", description="Merge train_step results.")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--out", type=Path, required=True, metavar="NAME", help="of NAME.md and NAME.png")
    args = parser.parse_args(argv)
    try:
        text = report([(path.stem, train_step.read_result(path)) for path in args.results], args.out)
    except ConfigError as error:
        tell(error)
        return 2
    print(text, end="")
    return 0


def report(results: Sequence[Named], name: Path) -> str:
    """Write NAME.md and, where there are profiles, NAME.png.

    Args:
        results: each by its name.
        name: the path of both without their endings.

    Returns:
        The text of NAME.md.

    Raises:
        ConfigError: a file cannot be written, or matplotlib is not installed.
    """
    tables = [table(HEADER, [_row(run, result, mode, found) for run, result, mode, found in _measured(results)])]
    notes = [setting(results[0][1]["environment"]), *NOTES, *(line for one in results for line in _said(*one))]
    settings = [row for one in results for row in _tried(*one)]
    if settings:
        tables.append(table(["run, other settings", "recompute", "offload", "step s", "GPU GiB"], settings))
    text = document("Whole training steps", "\n".join(tables), notes, {})
    if any("parts_ms" in found for _, _, _, found in _measured(results)):  # only GPUs have a profile
        draw(results, name.with_name(f"{name.name}.png"))
    write_text(name.with_name(f"{name.name}.md"), text)
    return text


def _measured(results: Sequence[Named]) -> Iterator[tuple[str, Record, str, Record]]:
    for run, result in results:
        for mode, found in result["modes"].items():
            yield run, result, mode, found


def _row(run: str, result: Record, mode: str, found: Record) -> list[str]:
    return [run, f"{result['config']['seq_len']:,}", _rows_attended(result, mode), *train_step.row(mode, found)]


def _rows_attended(result: Record, mode: str) -> str:
    run = validate(RunConfig, result["config"])
    return "-" if mode == "dense" else f"{run.attention.subsequence_length(run.padded_len):,}"


def _said(run: str, result: Record) -> Iterator[str]:
    """What the table does not hold: ratios, dense steps that were not run, losses."""
    modes = result["modes"]
    if {"lighthouse", "dense"} <= modes.keys():
        ratio = modes["lighthouse"]["tokens_per_s_per_gpu"] / modes["dense"]["tokens_per_s_per_gpu"]
        yield f"{run}: {ratio:.2f} times as many tokens/s with Lighthouse attention as dense, in the same run."
    if dense := result.get("dense_extrapolated"):
        yield (
            f"{run}: a dense step would take {dense['step_ms'] / 1e3:.0f} s, {dense['tokens_per_s_per_gpu']:,.0f} "
            f"tokens/s, {dense['ratio']:.0f} times as long: extrapolated from one call of one layer's attention, "
            f"forward and backward, {dense['layer_forward_backward_ms'] / 1e3:.1f} s."
        )
    for mode, found in modes.items():
        losses = found["losses"]
        yield f"{run}, {mode}: loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps."


def _tried(run: str, result: Record) -> Iterator[list[str]]:
    for mode, best in result["modes"].items():
        for found in best["tried"]:
            memory = found["memory"]
            some = memory["recompute_layers"]
            recompute = memory["recompute"] + ("" if some is None else f" {some}")
            gib = f"{found['gpu_gib']:.1f}" if found.get("gpu_gib") else "-"
            fits = [f"{found['step']['p50_ms'] / 1e3:.3f}", gib] if found["fits"] else ["-", "too little"]
            yield [f"{run}, {mode}", recompute, str(memory["offload_layers"]), *fits]


def draw(results: Sequence[Named], path: Path) -> None:
    """What a token costs, by part: a bar for each run and mode with a profile.

    Raises:
        ConfigError: matplotlib is not installed, or `path` cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the picture needs matplotlib: pip install 'lhcp[plot]'") from None
    bars = [one for one in _measured(results) if "parts_ms" in one[3]]
    figure = Figure(figsize=(11, 1.6 + 0.55 * len(bars)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw_bars(axes, bars)
    figure.suptitle(f"Where a training step's time goes. {setting(results[0][1]['environment'])}", fontsize=10)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another place") from None


def _draw_bars(axes: Axes, bars: Sequence[tuple[str, Record, str, Record]]) -> None:
    labels = []
    for place, (_, result, mode, found) in enumerate(bars):
        tokens = result["config"]["seq_len"] * result["config"]["global_batch_size"]
        left = 0.0
        for part in PARTS:
            width = found["parts_ms"][part] / tokens * 1e3
            label = part if place == 0 else None
            axes.barh(place, width, left=left, color=COLORS[part], label=label, height=0.7)
            left += width
        speed = f"{found['tokens_per_s_per_gpu']:,.0f} tokens/s"
        axes.annotate(speed, (left, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
        labels.append(f"{result['config']['seq_len']:,} tokens, {mode}")
    axes.set_yticks(range(len(bars)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds a token on one GPU")
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


if __name__ == "__main__":
    sys.exit(main())
