"""Where the time of a step goes on a GPU, from a profiler's trace: attention, matrix products, loss, and so on.

The compute stream runs one kernel at a time, so its parts, idle time and NCCL's exposed transfers add up to the step.
Copies to and from host memory, and NCCL's transfers, run beside it; of them the time counts in which nothing else runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Event = dict[str, Any]
Span = tuple[float, float]

ATTENTION, AROUND, GEMM, LOSS = "attention", "around attention", "matrix products", "loss"
OPTIMIZER, OFFLOAD, OTHER, IDLE = "optimizer", "offload, exposed", "other", "idle"
PARTS = (ATTENTION, AROUND, GEMM, LOSS, OPTIMIZER, OFFLOAD, OTHER, IDLE)

_ATTENTION = ("cudnn", "fmha", "flash", "sdpa")
_LIGHTHOUSE = ("_pool_kernel", "_select_kernel", "_gather_kernel", "_spread_kernel")
_GEMM = ("nvjet", "gemm", "cutlass", "cublas")
_NCCL = "nccldevkernel"


def step_parts(step: Callable[[], object]) -> dict[str, Any]:
    """Milliseconds of one call of `step`: by part, `PARTS`; of copies; of NCCL's transfers; of the longest kernels."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as recorded:
        step()
        torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return parts(events)


def parts(events: Iterable[Event]) -> dict[str, Any]:
    """See `step_parts`, of the events of a Chrome trace; times in them are microseconds."""
    events = [event for event in events if event.get("ph") == "X"]
    loss = _named(events, "loss")
    optimizer = [span for name in _optimizer_names(events) for span in _named(events, name)]
    times = dict.fromkeys(PARTS, 0.0)
    busy: list[Span] = []
    copies: list[Span] = []
    transfers: list[Span] = []
    kernels: dict[str, list[float]] = {}
    for event in events:
        span = (event["ts"], event["ts"] + event["dur"])
        if event.get("cat") == "gpu_memcpy" and ("HtoD" in event["name"] or "DtoH" in event["name"]):
            copies.append(span)
        elif event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            if _NCCL in event["name"].lower():
                transfers.append(span)
            else:
                busy.append(span)
                times[_part(event["name"], span, loss, optimizer)] += event["dur"]
            kernels.setdefault(event["name"], []).append(event["dur"])
    both, everything = _length(busy + copies), _length(busy + copies + transfers)
    times[OFFLOAD] = both - _length(busy)
    ends = [end for _, end in busy + copies + transfers]
    times[IDLE] = max(ends) - min(start for start, _ in busy + copies + transfers) - everything
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:40]
    return {
        "parts_ms": {part: time / 1e3 for part, time in times.items()},
        "copies_ms": _length(copies) / 1e3,
        "transfers_ms": {"all": _length(transfers) / 1e3, "exposed": (everything - both) / 1e3},
        "kernels": [{"name": name[:120], "calls": len(x), "ms": sum(x) / 1e3} for name, x in longest],
    }


def _part(name: str, span: Span, loss: Sequence[Span], optimizer: Sequence[Span]) -> str:
    lower = name.lower()
    if _inside(span, loss):
        return LOSS
    if _inside(span, optimizer):
        return OPTIMIZER
    if any(word in lower for word in _LIGHTHOUSE):
        return AROUND
    if any(word in lower for word in _ATTENTION):
        return ATTENTION
    return GEMM if any(word in lower for word in _GEMM) else OTHER


def _named(events: Sequence[Event], name: str) -> list[Span]:
    """When the GPU was in what the host marked by `name`."""
    return [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "gpu_user_annotation" and event["name"] == name
    ]


def _optimizer_names(events: Sequence[Event]) -> set[str]:
    return {event["name"] for event in events if str(event["name"]).startswith("Optimizer.step#")}


def _inside(span: Span, spans: Sequence[Span]) -> bool:
    return any(start <= span[0] and span[1] <= end for start, end in spans)


def _length(spans: Sequence[Span]) -> float:
    """Of the union."""
    whole, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        whole += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return whole
