"""What the benchmarks share: timing, the environment in their results, atomic files, tables, merged reports."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lhcp import run
from lhcp.config import ConfigError
from lhcp.environment import now, versions
from lhcp.launch.snapshot import code_digest

WARM_UP = 2
"""Calls before the first that is timed; one where that takes `LEAST_MS`."""
LEAST_MS, MOST_TURNS = 1000, 20
"""Time that calls on a GPU are measured for, and how many times `repeats` they may be for it."""
HEAD_START = 4_000_000
"""GPU cycles, about 2 ms, in which the host can queue a call."""
NO_RESULT = "no result: see its log"

Record = dict[str, Any]


def timed(call: Callable[[], object], device: torch.device, repeats: int, *, queued: bool = False) -> dict[str, float]:
    """Times of `call` after a warm-up, each that of the slowest rank (collective where there are ranks).

    On GPUs calls follow each other as in training, without waiting, for `LEAST_MS` or `MOST_TURNS` times `repeats`; on
    CPUs they begin together, one by one.

    Args:
        call: what is timed.
        device: where it runs.
        repeats: calls that are timed, at least.
        queued: on a GPU, queue all calls before the first begins, so that what the host takes does not count.

    Returns:
        `p20_ms`, `p50_ms`, `p80_ms`: percentiles over `repeats` calls or more, milliseconds.
    """
    if device.type == "cuda":
        milliseconds_of = _in_a_stream(call, repeats, queued)
    else:
        milliseconds_of = [1e3 * seconds for seconds in _one_by_one(call, device, repeats)]
    times = torch.tensor(milliseconds_of, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(times, dist.ReduceOp.MAX)
    return percentiles(times.tolist())


def percentiles(milliseconds_of: Sequence[float]) -> dict[str, float]:
    """`p20_ms`, `p50_ms`, `p80_ms`."""
    found = np.percentile(np.asarray(milliseconds_of), (20, 50, 80))
    return {f"p{p}_ms": float(value) for p, value in zip((20, 50, 80), found, strict=True)}


def difference(call: Callable[[], object], other: Callable[[], object], device: torch.device, repeats: int) -> Record:
    """How much longer `call` takes than `other`, each pair one after the other: clocks drift more than they differ.

    Returns:
        Percentiles over `repeats` pairs or more.
    """
    if device.type == "cuda":
        turns = itertools.cycle((call, other))
        times = _in_a_stream(lambda: next(turns)(), 2 * repeats, queued=False)
    else:
        pairs = [(_one_by_one(call, device, 1), _one_by_one(other, device, 1)) for _ in range(repeats)]
        times = [1e3 * seconds for pair in pairs for (seconds,) in pair]
    return percentiles([a - b for a, b in zip(times[::2], times[1::2], strict=True)])


def _in_a_stream(call: Callable[[], object], repeats: int, queued: bool) -> list[float]:
    """Milliseconds on the GPU, of as many calls as make `LEAST_MS`.

    Short of that a GPU at its limit of power has not settled on a clock: the same kernel takes 10% more or less from
    one second to the next.
    """
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken = 0.0
    for _ in range(WARM_UP):
        if taken < LEAST_MS:
            first.record()
            call()
            last.record()
            torch.cuda.synchronize()
            taken = largest_over_ranks(first.elapsed_time(last), torch.device("cuda"))  # or ranks would differ in calls
    turns = math.ceil(LEAST_MS / repeats / max(0.01, taken))
    repeats *= max(1, min(turns, MOST_TURNS))
    if queued:
        torch.cuda._sleep(HEAD_START * repeats)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return [float(before.elapsed_time(after)) for before, after in itertools.pairwise(marks)]


def _one_by_one(call: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds from when all ranks begin to when this one has done."""
    seconds = []
    for _ in range(WARM_UP + repeats):
        _meet(device)
        started = time.perf_counter()
        call()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP:]


def _meet(device: torch.device) -> None:
    """Let ranks begin together; not `dist.barrier`, which has to guess a rank's GPU."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1, device=device))
    _synchronize(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """Begin to count peak memory anew; on a CPU where the kernel allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the largest rank, GiB: allocated on the GPU, or resident in the process (collective)."""
    return largest_over_ranks(run.peak_memory_gib(device), device)


def largest_over_ranks(value: float, device: torch.device) -> float:
    """The largest of the ranks' values, infinity where one is not a number (collective)."""
    largest = torch.tensor(math.inf if math.isnan(value) else value, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def environment(device: torch.device, dtype: str) -> Record:
    """What the numbers depend on besides the configuration, over all ranks (collective)."""
    cpu = platform.processor() or platform.machine()
    mine = (platform.node(), torch.cuda.get_device_name(device) if device.type == "cuda" else cpu)
    ranks = [mine]
    if dist.is_initialized():
        ranks = [mine] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
    nccl = {"nccl": ".".join(map(str, torch.cuda.nccl.version()))} if device.type == "cuda" else {}
    return {
        **software(nccl),
        "ranks": len(ranks),
        "hosts": sorted({host for host, _ in ranks}),
        "devices": sorted({name for _, name in ranks}),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "nccl_settings": {key: value for key, value in sorted(os.environ.items()) if key.startswith("NCCL_")},
    }


def software(more: Mapping[str, str] | None = None) -> Record:
    """When, in which job, and by which code and versions; `more` are versions of what only some machines have."""
    return {
        "time": now(),
        "versions": versions() | dict(more or {}),
        "code": code_digest(),
        "benchmark_code": code_digest(Path(__file__).parent),
        **{key.lower(): os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST") if key in os.environ},
    }


def write_json(path: Path, value: Record) -> None:
    """Write `value` whole or not at all; a number that is not finite becomes null, since JSON has none.

    Raises:
        ConfigError: it cannot be written.
    """
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` whole or not at all, in a folder that is made if needed.

    Raises:
        ConfigError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another place") from None


def make_way(path: Path) -> None:
    """Before measuring: see that `path` can be written, and remove the result of an earlier attempt.

    Raises:
        ConfigError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); choose another place") from None
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{path} cannot be written (no permission in {path.parent}); choose another place")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that is aligned as text, too: the first column to the left, numbers to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def shown(cells: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join([first.strip().ljust(widths[0]), *others])} |\n"

    return "".join(map(shown, [lines[0], rule, *lines[1:]]))


def milliseconds(times: Mapping[str, Mapping[str, float]] | None) -> str:
    """Medians, forward / forward and backward; `-` where nothing was measured."""
    return f"{times['forward']['p50_ms']:.2f} / {times['forward_backward']['p50_ms']:.2f}" if times else "-"


def ratios(ratio: Mapping[str, float] | None) -> str:
    """Forward / forward and backward; `-` where nothing was measured."""
    return f"{ratio['forward']:.2f} / {ratio['forward_backward']:.2f}" if ratio else "-"


def setting(environment: Mapping[str, Any]) -> str:
    """What was measured on, in one line."""
    torch_version = environment["versions"]["torch"]
    return f"Measured on {', '.join(environment['devices'])} in {environment['dtype']}, torch {torch_version}."


def read_names(path: Path | None) -> list[str]:
    """The expected elements of a report: one name a line; none without a file.

    Raises:
        ConfigError: there is no such file.
    """
    if path is None:
        return []
    try:
        return [name for line in path.read_text(encoding="utf-8").splitlines() if (name := line.strip())]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--expect {path} cannot be read ({error}); give a text file with one name a line") from None


def check_folder(folder: Path) -> None:
    """Refuse to report on a folder that is not there.

    Raises:
        ConfigError: naming it.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; name the one that holds the results")


def document(title: str, tables: str, notes: Sequence[str], problems: Mapping[str, str]) -> str:
    """A report in Markdown: the table, what its numbers mean, and what is missing from it, by name."""
    parts = [f"# {title}\n", tables, "\n".join(f"{note}  " for note in notes) + "\n"]
    if problems:
        parts += ["## Missing or failed\n", "".join(f"- {name}: {what}\n" for name, what in problems.items())]
    return "\n".join(parts)
