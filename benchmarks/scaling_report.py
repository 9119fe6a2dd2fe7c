"""Tables of results of `benchmarks.scaling`: what was measured, and, apart, what was projected."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import layer as layers
from benchmarks.common import NO_RESULT, Record, check_folder, document, setting, table, write_text
from benchmarks.emulation import FACTORS, NETWORKS

NAME = "scaling"
REPORT_FILE = "scaling.md"
KEYS = ["element", "N", "cp", "exchange", "attention"]
MEASURED = [*KEYS, "ms", "compute ms", "host ms", "exposed %", "overhead %", "tokens/s per rank", "sent MB", "GiB"]
EMULATED = [
    *KEYS,
    "compute ms",
    "host ms",
    "balance",
    "overhead %",
    "sent MB",
    "GiB",
    *(f"{name}, exposed %" for name in NETWORKS),
]
NOTES = (
    "One layer, B = 1. Two numbers are of forward / of forward and backward. Times are medians of the slowest rank; MB "
    "are 10^6 bytes that each rank sends.",
    "overhead: time over that of the whole layer on one device, divided by cp. That of dense attention on one device "
    "is measured at N / cp tokens and taken cp^2 times.",
)
MEASURED_NOTE = (
    "Measured over ranks. compute: what a rank's device takes without transfers, a GPU as a CUDA graph. host: what it "
    "takes to launch that without one. exposed: what transfers or the host add. tokens/s: forward and backward."
)
EMULATED_NOTE = (
    "Measured on one device, each rank alone, without transfers: compute (a GPU as a CUDA graph), what the host takes "
    "to launch it without one, balance (slowest rank over the mean), overhead of compute. Of dense attention the first "
    "and the last rank alone. Projected, of forward and backward: what transfers would add to compute, at "
    f"{', '.join(f'{f:g}' for f in FACTORS)} times the bandwidth of "
    + "; ".join(f"{name}, {n.gb_per_s:g} GB/s and {n.latency_us:g} us ({n.source})" for name, n in NETWORKS.items())
    + "."
)


def tables(results: Mapping[str, Record]) -> str:
    """Of results whose check passed, by name: one table of those measured over ranks, one of those emulated.

    Raises:
        KeyError, TypeError, ValueError: one is not whole.
    """
    found = sorted(results.items(), key=lambda item: (item[1]["config"]["seq_len"], item[1]["config"]["cp"], item[0]))
    parts = []
    for emulated, header, note in ((False, MEASURED, MEASURED_NOTE), (True, EMULATED, EMULATED_NOTE)):
        row = _emulated if emulated else _measured
        rows = [
            [*_keys(name, result["config"]), exchange, attention, *row(times, result["one_device"][attention], result)]
            for name, result in found
            if result["emulated"] is emulated
            for exchange, of_exchange in result["exchanges"].items()
            for attention, times in of_exchange.items()
        ]
        if rows:
            parts.append(f"{table(header, rows)}\n{note}\n")
    return "\n".join(parts)


def _keys(name: str, config: Record) -> list[str]:
    return [name, f"{config['seq_len']:,}", f"{config['cp']:,}"]


def _measured(times: Record, one_device: Record, result: Record) -> list[str]:
    milliseconds = {kind: times[kind]["p50_ms"] for kind in one_device}
    compute = times.get("compute_ms")
    exposed = {kind: 100 * times["exposed_ms"][kind] / compute[kind] for kind in compute} if compute else None
    return [
        _pair(milliseconds, ".2f"),
        _pair(compute, ".2f"),
        _pair(times.get("host_ms"), ".2f"),
        _pair(exposed, ".1f"),
        _pair(_overhead(milliseconds, one_device, result["config"]["cp"]), ".1f"),
        f"{times['tokens_per_s_per_rank']:,.0f}",
        _sent(times),
        f"{times['peak_memory_gib']:.2f}",
    ]


def _emulated(times: Record, one_device: Record, result: Record) -> list[str]:
    slowest = {kind: max(of_rank.values()) for kind, of_rank in times["compute_ms"].items()}
    mean = {kind: sum(of_rank.values()) / len(of_rank) for kind, of_rank in times["compute_ms"].items()}
    both = "forward_backward"
    projected = [
        " / ".join(f"{100 * of[both] / slowest[both]:.1f}" for of in by_factor.values())
        for by_factor in times["projected_exposed_ms"].values()
    ]
    return [
        _pair(slowest, ".2f"),
        _pair(times["host_ms"], ".2f"),
        f"{slowest[both] / mean[both]:.3f}",
        _pair(_overhead(slowest, one_device, result["config"]["cp"]), ".1f"),
        _sent(times),
        f"{times['peak_memory_gib']:.2f}",
        *projected,
    ]


def _overhead(milliseconds: Record, one_device: Record, world: int) -> dict[str, float]:
    """Percent above a share of one device's time."""
    return {kind: 100 * (milliseconds[kind] * world / one_device[kind] - 1) for kind in milliseconds}


def _sent(times: Record) -> str:
    sent = times["bytes"]
    return _pair({"forward": sent["forward"] / 1e6, "both": (sent["forward"] + sent["backward"]) / 1e6}, ",.1f")


def _pair(values: Mapping[str, Any] | None, form: str) -> str:
    """Of forward / of forward and backward; `-` where nothing was measured."""
    return " / ".join(f"{value:{form}}" for value in values.values()) if values else "-"


def report(folder: Path, expected: Sequence[str]) -> int:
    """Merge the results in `folder` into its `REPORT_FILE` and print that; 1 when one is missing or failed.

    Raises:
        ConfigError: no such folder, or it cannot be written to.
    """
    check_folder(folder)
    results, problems, foreign = _read(folder, expected)
    notes = [*NOTES, *sorted({setting(result["environment"]) for result in results.values()})]
    notes += [f"Left out, since not a result of this benchmark: {', '.join(foreign)}."] if foreign else []
    text = document("Scaling of one attention layer", tables(results), notes, problems)
    write_text(folder / REPORT_FILE, text)
    print(text, end="")
    return 1 if problems or not results else 0


def _read(folder: Path, expected: Sequence[str]) -> tuple[dict[str, Record], dict[str, str], list[str]]:
    """The results in a folder; what is wrong with others, by name; files that are something else."""
    results: dict[str, Record] = {}
    problems = dict.fromkeys(expected, NO_RESULT)
    foreign: list[str] = []
    for path in sorted(folder.glob("*.json")):
        name = path.stem
        try:
            result = json.loads(path.read_bytes())
            if not isinstance(result, dict) or result.get("benchmark") != NAME:
                if name in problems:
                    problems[name] = f"{path.name} is not a result of this benchmark"
                else:
                    foreign.append(path.name)
            elif not isinstance(result.get("emulated"), bool):
                problems[name] = f"{path.name} is a result of another version; measure again"
            elif result["check"]["passed"] is not True:
                problems[name] = layers.complaint(result["check"])
            else:
                if not tables({name: result}):
                    raise ValueError("nothing was measured")
                setting(result["environment"])
                results[name] = result
                problems.pop(name, None)
        except (OSError, AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, RecursionError) as error:
            problems[name] = f"{path.name} is damaged ({type(error).__name__}: {error})"
    return results, problems, foreign
