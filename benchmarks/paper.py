"""The runs that arXiv:2605.06554 reports on B200s, beside what `lhcp plan` says of them.

    python -m benchmarks.paper --out NAME

writes NAME.json and NAME.md. Nothing is measured here: the plan's rates are an H100's. Exit codes: 0 done, 2 something
that the user can correct.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lhcp
from benchmarks.common import Record, document, make_way, software, table, write_json, write_text
from lhcp import config_file
from lhcp.config import ConfigError
from lhcp.metrics import tell
from lhcp.plan import GPUS, plan_run

NAME = "paper"
CONFIGS = Path(lhcp.__file__).parent / "launch" / "configs" / "paper"
GPU_COUNT = 8
HEADER = ["run", "S", "published Ktok/s/GPU", "plan", "error %", "published GPU-hours", "plan", "error %"]
NOTES = (
    "Ktok/s/GPU: of the first stage, thousands of tokens. GPU-hours: of the whole run, 8 B200s.",
    "Error: the plan over what is published, less one. The plan is of this project's kernels, not the authors'.",
    "It takes a B200 to reach the shares of its peaks that an H100 reaches; nothing in it is fitted to these numbers.",
)


@dataclass(frozen=True)
class Row:
    """What is published of a run."""

    config: str
    """Its file in launch/configs/paper, without suffix."""
    ktok_per_s: float
    """Thousands of tokens a second and GPU, of the first stage."""
    gpu_hours: float
    """Of the whole run."""


ROWS = (
    Row("dense", 45.6, 303.2),
    Row("l3-p2-k6144-dilated-12k-4k", 74.7, 214.7),
    Row("l3-p2-k6144-dilated-11k-5k", 75.4, 219.6),
    Row("l3-p2-k6144-dilated-10k-6k", 75.0, 228.0),
    Row("l3-p2-k1536-dilated", 93.9, 203.9),
    Row("l3-p4-k1536-dilated", 99.5, 197.2),
    Row("l3-p8-k1536-dilated", 92.1, 206.2),
    Row("l3-p4-k1536-norm", 126.0, 179.6),
    Row("l4-p2-k1536-dilated", 96.4, 200.2),
    Row("l5-p2-k1536-dilated", 96.3, 201.5),
    Row("l3-p2-k2048-dilated", 90.9, 208.1),
    Row("l3-p2-k4096-dilated", 83.5, 215.7),
    Row("cp2-l3-p4-k1536-norm", 91.8, 208.3),
    Row("cp2-l3-p4-k2048-norm", 89.2, 210.9),
    Row("cp8-256k-l3-p4-k4096-norm", 48.9, 1300.3),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and write; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.paper", description="Published runs beside their plans.")
    parser.add_argument("--out", type=Path, required=True, metavar="NAME", help="of NAME.json and NAME.md")
    args = parser.parse_args(argv)
    data, text = (args.out.with_name(f"{args.out.name}{suffix}") for suffix in (".json", ".md"))
    try:
        make_way(data)
        rows = [compare(row) for row in ROWS]
        write_json(data, {"benchmark": NAME, "software": software(), "gpu": "b200", "rows": rows})
        report = show(rows)
        write_text(text, report)
    except ConfigError as error:
        tell(error)
        return 2
    print(report, end="")
    return 0


def compare(row: Row) -> Record:
    """A run's plan beside what is published of it; errors as shares of that."""
    run = config_file.load(CONFIGS / f"{row.config}.yaml")
    plan = plan_run(run, GPU_COUNT, GPUS["b200"])
    first = plan.stages[0]
    ktok = first.tokens_per_s_per_gpu / 1e3
    return {
        "run": row.config,
        "subsequence_length": plan.constraints.subsequence,
        "memory": run.memory.model_dump(),
        "peak_gib": max(stage.memory.peak for stage in plan.stages) / 2**30,
        "ktok_per_s": {"published": row.ktok_per_s, "plan": ktok, "error": ktok / row.ktok_per_s - 1},
        "gpu_hours": {
            "published": row.gpu_hours, "plan": plan.gpu_hours, "error": plan.gpu_hours / row.gpu_hours - 1,
        },
    }  # fmt: skip


def show(rows: Sequence[Record]) -> str:
    """The report."""
    keys = ("ktok_per_s", "gpu_hours")
    middle = [f"{statistics.median(abs(row[key]['error']) for row in rows):.0%}" for key in keys]
    notes = (*NOTES, f"Median of the errors' sizes: {middle[0]} of tokens per second, {middle[1]} of GPU-hours.")
    return document("Published runs and their plans", table(HEADER, map(_cells, rows)), notes, {})


def _cells(row: Record) -> list[str]:
    subsequence = row["subsequence_length"]
    cells = [row["run"], "-" if subsequence is None else f"{subsequence:,}"]
    for key in ("ktok_per_s", "gpu_hours"):
        compared = row[key]
        cells += [f"{compared['published']:,.1f}", f"{compared['plan']:,.1f}", f"{100 * compared['error']:+.0f}"]
    return cells


if __name__ == "__main__":
    sys.exit(main())
