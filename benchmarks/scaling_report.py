"""Tables of results of `benchmarks.scaling`: what was measured, what was projected, both together, how exact it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import layer as layers
from benchmarks.common import NO_RESULT, Record, check_folder, document, setting, table, write_text
from benchmarks.emulation import FACTORS, NETWORKS

NAME = "scaling"
REPORT_FILE = "scaling.md"
KEYS = ["element", "N", "cp", "exchange", "attention"]
MEASURED = [
    *KEYS,
    "ms",
    "compute ms",
    "host ms",
    "exposed %",
    "overhead %",
    "tokens/s per rank",
    "sent MB",
    "hop GB/s",
    "GiB",
]
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
SPEED_UP = ["element", "N", "cp", "exchange", "lighthouse ms", "dense ms", "times as fast"]
PROJECTED = [
    *KEYS,
    "compute ms, alone",
    "in the group",
    "exposed %, projected",
    "measured",
    "ms, projected",
    "measured",
]
EXACT = ["element", "N", "cp", "dtype", "exchange", "attention", "entries", "out", "dq", "dk", "dv"]
NOTES = (
    "One layer, B = 1. Two numbers are of forward / of forward and backward. Times are medians of the slowest rank; MB "
    "are 10^6 bytes, of the rank that sends most.",
    "overhead: time over that of the whole layer on one device, divided by cp. That of dense attention on one device "
    "is measured at N / cp tokens and taken cp^2 times.",
)
MEASURED_NOTE = (
    "Measured over ranks. compute: what a rank's device takes without transfers, a GPU as a CUDA graph. host: what it "
    "takes to launch that without one. exposed: what transfers or the host add. tokens/s: forward and backward. hop: "
    "all keys and values of a rank, sent one rank on beside no compute."
)
EMULATED_NOTE = (
    "Measured on one device, each rank alone, without transfers: compute (a GPU as a CUDA graph), what the host takes "
    "to launch it without one, balance (slowest rank over the mean), overhead of compute. Of dense attention the first "
    "and the last rank alone. Projected, of forward and backward: what transfers would add to compute, at "
    f"{', '.join(f'{f:g}' for f in FACTORS)} times the bandwidth of "
    + "; ".join(f"{name}, {n.gb_per_s:g} GB/s and {n.latency_us:g} us ({n.source})" for name, n in NETWORKS.items())
    + "."
)
SPEED_UP_NOTE = (
    "Dense attention over the same ranks, by the same exchange, balanced by the same sharding, in the same run."
)
LINK = next(iter(NETWORKS))
PROJECTED_NOTE = (
    f"Emulated on one device beside measured over ranks. Exposed: forward and backward, projected at "
    f"{', '.join(f'{f:g}' for f in FACTORS)} times the bandwidth of {LINK}. ms, projected: what the slowest rank "
    f"computes alone and what {LINK} would add."
)
EXACT_NOTE = (
    "Errors against one process in float64, relative norms of the worst rank; in brackets in those of one process of "
    f"the same dtype and attention kernel, of which {layers.ROUNDING:g} are allowed. entries: percent that one process "
    "does not select. The length is that of the check."
)


def tables(results: Mapping[str, Record]) -> str:
    """Of results whose check passed, by name: a table of those measured over ranks, one of those emulated, how they
    compare, and how exact all are.

    Raises:
        KeyError, TypeError, ValueError: one is not whole.
    """
    found = sorted(results.items(), key=lambda item: (item[1]["config"]["seq_len"], item[1]["config"]["cp"], item[0]))
    timed = [(name, result) for name, result in found if "exchanges" in result or "alone" not in result["check"]]
    parts = _timed(timed)
    for header, rows, note in (
        (SPEED_UP, list(_speed_ups(timed)), SPEED_UP_NOTE),
        (PROJECTED, list(_projected(timed)), PROJECTED_NOTE),
        (EXACT, list(_exact(found)), EXACT_NOTE),
    ):
        if rows:
            parts.append(f"{table(header, rows)}\n{note}\n")
    return "\n".join(parts)


def _timed(found: Sequence[tuple[str, Record]]) -> list[str]:
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
    return parts


def _speed_ups(found: Sequence[tuple[str, Record]]) -> Iterator[list[str]]:
    for name, result in found:
        for exchange, of in result["exchanges"].items():
            if result["emulated"] or not {"lighthouse", "dense"} <= of.keys():
                continue
            sparse, dense = (_medians(of[attention]) for attention in ("lighthouse", "dense"))
            ratio = {kind: dense[kind] / sparse[kind] for kind in sparse}
            shown = (_pair(sparse, ".2f"), _pair(dense, ".2f"), _pair(ratio, ".1f"))
            yield [*_keys(name, result["config"]), exchange, *shown]


def _projected(found: Sequence[tuple[str, Record]]) -> Iterator[list[str]]:
    def of(emulated: bool) -> dict[tuple[Any, ...], tuple[str, Record]]:
        return {
            (config["seq_len"], config["cp"], exchange, attention, config["dtype"]): (name, times)
            for name, result in found
            if result["emulated"] is emulated
            for config in [result["config"]]
            for exchange, by_attention in result["exchanges"].items()
            for attention, times in by_attention.items()
        }

    both, projected = "forward_backward", of(emulated=True)
    for key, (name, times) in of(emulated=False).items():
        if key not in projected or "compute_ms" not in times:
            continue
        _, alone = projected[key]
        slowest = {kind: max(of_rank.values()) for kind, of_rank in alone["compute_ms"].items()}
        added = alone["projected_exposed_ms"][LINK]
        yield [
            name, f"{key[0]:,}", f"{key[1]:,}", key[2], key[3],
            _pair(slowest, ".2f"),
            _pair(times["compute_ms"], ".2f"),
            " / ".join(f"{100 * of_kind[both] / slowest[both]:.1f}" for of_kind in added.values()),
            f"{100 * times['exposed_ms'][both] / times['compute_ms'][both]:.1f}",
            _pair({kind: slowest[kind] + added["1.0"][kind] for kind in slowest}, ".2f"),
            _pair(_medians(times), ".2f"),
        ]  # fmt: skip


def _exact(found: Sequence[tuple[str, Record]]) -> Iterator[list[str]]:
    for name, result in found:
        check, config = result["check"], result["config"]
        if "alone" not in check:  # of a version that compared otherwise
            continue
        errors, alone = check["errors"], check["alone"]
        of_exchanges = [key.removesuffix(" selection") for key in errors if key.endswith(" selection")]
        for exchange in of_exchanges:
            for attention in ("lighthouse", "dense"):
                keys = [f"{exchange} {attention} {part}" for part in ("out", "dq", "dk", "dv")]
                shown = [f"{errors[k]:.1e}" + (f" ({errors[k] / alone[k]:.2f})" if alone.get(k) else "") for k in keys]
                entries = f"{100 * errors[f'{exchange} selection']:g}" if attention == "lighthouse" else "-"
                where = [name, f"{check['length']:,}", f"{config['cp']:,}", config["dtype"]]
                yield [*where, exchange, attention, entries, *shown]


def overhead(result: Record, exchange: str, attention: str) -> dict[str, float]:
    """Of a result that was measured: percent above a share of one device's time, by kind of pass."""
    times = result["exchanges"][exchange][attention]
    return _overhead(_medians(times), result["one_device"][attention], result["config"]["cp"])


def _medians(times: Record) -> dict[str, float]:
    return {kind: times[kind]["p50_ms"] for kind in ("forward", "forward_backward")}


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
        f"{times['hop_gb_per_s']:.1f}" if "hop_gb_per_s" in times else "-",
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
    results, problems, foreign = read(folder, expected)
    notes = [*NOTES, *sorted({setting(result["environment"]) for result in results.values()})]
    notes += [f"Left out, since not a result of this benchmark: {', '.join(foreign)}."] if foreign else []
    text = document("Scaling of one attention layer", tables(results), notes, problems)
    write_text(folder / REPORT_FILE, text)
    print(text, end="")
    return 1 if problems or not results else 0


def read(folder: Path, expected: Sequence[str]) -> tuple[dict[str, Record], dict[str, str], list[str]]:
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
