"""Results of `benchmarks.latency`, merged into a table and a picture.

    python -m benchmarks.latency_report RESULT.json ... --out NAME

writes NAME.md and NAME.png (which needs matplotlib). Exit codes: 0 done, 2 something that the user can correct.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import latency
from benchmarks.common import Record, document, setting, table, write_text
from lhcp.config import ConfigError
from lhcp.metrics import tell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STAGES_HEADER = ["N", "stage", "ms", "floor ms", "ms / floor"]
KINDS = {"forward": "forward", "forward_backward": "forward and backward"}
DENSE, SPARSE, FLOOR, ON_SUB = "#c8501e", "#1f4e8c", "#8fa9c9", "#707070"


def main(argv: Sequence[str] | None = None) -> int:
    """Read and write; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.latency_report", description="Merge latency results.")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json")
    parser.add_argument("--out", type=Path, required=True, metavar="NAME", help="of NAME.md and NAME.png")
    args = parser.parse_args(argv)
    try:
        results = [_read(path) for path in args.results]
        _check_alike(args.results, results)
        text = report(results, args.out)
    except ConfigError as error:
        tell(error)
        return 2
    print(text, end="")
    return 0


def _read(path: Path) -> Record:
    try:
        result: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a result of benchmarks.latency") from None
    if not isinstance(result, dict) or result.get("benchmark") != latency.NAME:
        raise ConfigError(f"{path} is not a result of benchmarks.latency")
    if not result.get("lengths"):
        raise ConfigError(f"{path}: nothing was timed, since its check failed; leave it out")
    try:
        [latency.row(at) for at in result["lengths"]]
        _alike(result)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} is of another version of benchmarks.latency ({error!r}); measure again") from None
    return result


def _alike(result: Record) -> Record:
    """What results in one table must have in common."""
    environment = result["environment"]
    alike = {key: environment[key] for key in ("devices", "versions", "code", "benchmark_code")}
    return alike | _layer(result) | {"dense_kernel": result["dense_kernel"]}


def _check_alike(paths: Sequence[Path], results: Sequence[Record]) -> None:
    """Refuse results that do not belong in one table.

    Raises:
        ConfigError: naming the first difference, or a length that is there twice.
    """
    first = _alike(results[0])
    for path, result in zip(paths, results, strict=True):
        for key, value in _alike(result).items():
            if value != first[key]:
                raise ConfigError(f"{key}: {first[key]} in {paths[0]}, {value} in {path}; report on each alone")
    measured = Counter((at["seq_len"], _pyramid(at)) for result in results for at in result["lengths"])
    for (tokens, pyramid), times in measured.items():
        if times > 1:
            raise ConfigError(f"{tokens} tokens at {pyramid} are in the results {times} times; leave all but one out")


def report(results: Sequence[Record], name: Path) -> str:
    """Write NAME.md and NAME.png.

    Args:
        results: what `latency` wrote.
        name: the path of both without their endings.

    Returns:
        The text of NAME.md.

    Raises:
        ConfigError: a file cannot be written, or matplotlib is not installed.
    """
    lengths = sorted((at for result in results for at in result["lengths"]), key=lambda at: int(at["seq_len"]))
    shape = _layer(results[0])
    title = "One attention layer, Lighthouse against dense"
    described = "B = 1, {num_heads} query heads, {num_kv_heads} KV heads, width {head_dim}.".format(**shape)
    kernel = results[0]["dense_kernel"].replace("_", " ")
    copies = sorted(float(result["copy_tb_per_s"]) for result in results)
    notes = [
        latency.NOTE,
        f"{described} Random normal q, k, v. Dense: PyTorch's SDPA, {kernel}. {setting(results[0]['environment'])}",
        f"A large copy moves {copies[0]:.2f} to {copies[-1]:.2f} TB/s, read and written: the bandwidth of the floors.",
    ]
    tables = table(latency.HEADER, map(latency.row, lengths)) + "\n" + table(STAGES_HEADER, _stage_rows(lengths))
    text = document(title, tables, notes, {})
    caption = f"{title} (numbers: dense / Lighthouse)\n{described} {setting(results[0]['environment'])}"
    draw(lengths, caption, name.with_name(f"{name.name}.png"))
    write_text(name.with_name(f"{name.name}.md"), text)
    return text


def _layer(result: Record) -> Record:
    return {key: result["config"][key] for key in ("num_heads", "num_kv_heads", "head_dim", "dtype")}


def _stage_rows(lengths: Sequence[Record]) -> list[list[str]]:
    rows = []
    for at in lengths:
        stages = at["stages"].items()
        together = {key: sum(stage[key] for _, stage in stages) for key in ("p50_ms", "floor_ms")}
        rows += [_stage_row(at, name, stage) for name, stage in [*stages, ("all stages", together)]]
    return rows


def _stage_row(at: Record, name: str, stage: Record) -> list[str]:
    time, floor = stage["p50_ms"], stage["floor_ms"]
    return [f"{at['seq_len']:,}", name, f"{time:.3f}", f"{floor:.3f}", f"{time / floor:.2f}"]


def draw(lengths: Sequence[Record], title: str, path: Path) -> None:
    """Times over length, both axes logarithmic, forward beside forward and backward.

    Args:
        lengths: ascending.
        title: above both.
        path: of the PNG.

    Raises:
        ConfigError: matplotlib is not installed, or `path` cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the picture needs matplotlib: pip install 'lhcp[plot]'") from None
    figure = Figure(figsize=(11, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), KINDS, strict=True):
        _draw_kind(axes, lengths, kind)
    figure.suptitle(title, fontsize=10)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another place") from None


def _draw_kind(axes: Axes, lengths: Sequence[Record], kind: str) -> None:
    tokens = [at["seq_len"] for at in lengths]
    axes.plot(tokens, _times(lengths, "dense", kind), "o-", color=DENSE, label="dense SDPA")
    by_pyramid = itertools.groupby(lengths, key=_pyramid)
    for (pyramid, series), marker in zip(((name, list(group)) for name, group in by_pyramid), "osD^v", strict=False):
        x, sparse = [at["seq_len"] for at in series], _times(series, "lighthouse", kind)
        on_sub = _times(series, "dense_on_subsequence", kind)
        roofline = [a + at["floor_ms"][kind] for a, at in zip(on_sub, series, strict=True)]
        axes.plot(x, sparse, f"{marker}-", color=SPARSE, label=f"Lighthouse, {pyramid}")
        first = pyramid == _pyramid(lengths[0])
        axes.plot(x, roofline, "_--", color=FLOOR, label="its roofline: SDPA on S, and bytes" if first else None)
        axes.plot(x, on_sub, "_:", color=ON_SUB, label="SDPA on S alone" if first else None)
        for at, where, time in zip(series, x, sparse, strict=True):
            times = f"{at['ratio'][kind]:.{0 if at['ratio'][kind] > 99 else 1}f}x"
            axes.annotate(
                times, (where, time), (-2, 7), textcoords="offset points", ha="right", fontsize=8, color=SPARSE
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.set_xticks(tokens, [f"{x // 1024:,}K" if x < 2**20 else f"{x // 2**20}M" for x in tokens], fontsize=8)
    axes.minorticks_off()
    axes.set_xlim(tokens[0] / 2, 1.5 * tokens[-1])
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds")
    axes.tick_params(labelleft=True)
    axes.set_title(KINDS[kind], fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _times(lengths: Sequence[Record], which: str, kind: str) -> list[float]:
    return [float(at[which][kind]["p50_ms"]) for at in lengths]


def _pyramid(at: Record) -> str:
    attention = at["attention"]
    share = f"{at['seq_len'] / attention['topk']:g}"
    return f"L={attention['num_levels']}, p={attention['pooling_factor']}, k=N/{share}"


if __name__ == "__main__":
    sys.exit(main())
