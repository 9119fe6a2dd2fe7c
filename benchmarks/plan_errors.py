"""What `lhcp plan` says of runs that `benchmarks.train_step` has measured: memory, and the time of a step.

    python -m benchmarks.plan_errors RESULT.json ... --out NAME

writes NAME.json and NAME.md. Exit codes: 0 done, 2 something that the user can correct.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Record, document, make_way, software, table, write_json, write_text
from benchmarks.train_step import read_result
from lhcp.config import ConfigError, MemoryConfig, RunConfig, StageConfig
from lhcp.config.validation import validate
from lhcp.metrics import tell
from lhcp.plan import GPUS, Gpu, plan_run

NAME = "plan_errors"
HEADER = [
    "run",
    "N",
    "memory",
    "GPU GiB",
    "plan",
    "error %",
    "host GiB",
    "plan",
    "step s",
    "plan",
    "error %",
    "plan fits",
]
NOTES = (
    "GPU GiB: the peak of what tensors take. Host GiB: pinned, for layers' inputs. Step: the median.",
    "Error: the plan over what was measured, less one.",
    "Where memory just suffices, though the plan says no, the allocator gives it back and takes it anew in every step:",
    "that time is not in a plan.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and write; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.plan_errors", description="Plans beside measured steps.")
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT.json", help="of benchmarks.train_step")
    parser.add_argument("--out", type=Path, required=True, metavar="NAME", help="of NAME.json and NAME.md")
    args = parser.parse_args(argv)
    data, text = (args.out.with_name(f"{args.out.name}{suffix}") for suffix in (".json", ".md"))
    try:
        make_way(data)
        rows = [row for path in args.results for row in compare(path)]
        write_json(data, {"benchmark": NAME, "software": software(), "rows": rows})
        report = document("Plans and measured steps", table(HEADER, map(_cells, rows)), NOTES, {})
        write_text(text, report)
    except ConfigError as error:
        tell(error)
        return 2
    print(report, end="")
    return 0


def compare(path: Path) -> Iterator[Record]:
    """Each mode of a result, at each setting that was measured, beside its plan.

    Raises:
        ConfigError: not such a result, or not of a GPU that plans know.
    """
    result = read_result(path)
    modes, environment = result["modes"], result["environment"]
    gpu = _gpu(environment["devices"])
    for mode, best in modes.items():
        for found in (best, *best.get("tried", [])):
            if found["fits"]:
                yield _row(path.stem, _run(result["config"], mode, found["memory"]), found, gpu, environment["ranks"])


def _gpu(devices: Sequence[str]) -> Gpu:
    known = [gpu for name, gpu in GPUS.items() if devices and all(name.upper() in device.split() for device in devices)]
    if not known:
        raise ConfigError(f"measured on {', '.join(devices)}: plans know {', '.join(GPUS)}")
    return known[0]


def _run(config: Any, mode: Any, memory: Any) -> RunConfig:
    stages = [StageConfig(mode=mode, steps=1)]
    settings = MemoryConfig.model_validate(memory)
    return validate(RunConfig, config).model_copy(update={"stages": stages, "memory": settings})


def _row(name: str, run: RunConfig, found: Record, gpu: Gpu, ranks: int) -> Record:
    plan = plan_run(run, ranks, gpu, gpus_per_node=ranks)
    (stage,) = plan.stages
    measured_s, measured_gib = found["step"]["p50_ms"] / 1e3, found["gpu_gib"]
    planned_gib = stage.memory.peak / 2**30
    return {
        "run": f"{name}, {stage.mode}",
        "seq_len": run.seq_len,
        "memory": run.memory.model_dump(),
        "gpu_gib": {"measured": measured_gib, "plan": planned_gib, "error": planned_gib / measured_gib - 1},
        "host_gib": {"measured": found["offloaded_gib"], "plan": stage.memory.host / 2**30},
        "step_s": {"measured": measured_s, "plan": stage.step.total, "error": stage.step.total / measured_s - 1},
        "parts_s": {"measured_ms": found["parts_ms"], "plan": vars(stage.step)},
        "moment": stage.memory.moment,
        "fits": plan.fits,
    }


def _cells(row: Record) -> list[str]:
    memory = row["memory"]
    layers = "" if memory["recompute_layers"] is None else f" {memory['recompute_layers']}"
    setting = f"{memory['recompute']}{layers}, {memory['offload_layers']} offloaded"
    gib, host, step = row["gpu_gib"], row["host_gib"], row["step_s"]
    return [
        row["run"],
        f"{row['seq_len']:,}",
        setting,
        *(f"{gib['measured']:.1f}", f"{gib['plan']:.1f}", f"{100 * gib['error']:+.0f}"),
        *(f"{host['measured']:.1f}", f"{host['plan']:.1f}"),
        *(f"{step['measured']:.3f}", f"{step['plan']:.3f}", f"{100 * step['error']:+.0f}"),
        "yes" if row["fits"] else "no",
    ]


if __name__ == "__main__":
    sys.exit(main())
