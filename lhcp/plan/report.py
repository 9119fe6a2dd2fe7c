"""A plan as text, and as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any

from lhcp.plan.gpus import GIB
from lhcp.plan.run import Plan, StagePlan
from lhcp.plan.time import Seconds
from lhcp.volume import Bytes

PARTS = {
    "gemm": "matrix products",
    "attention": "attention",
    "scorer": "scorer (dilated)",
    "lighthouse": "Lighthouse around attention",
    "elementwise": "norms, RoPE, SwiGLU, residuals",
    "loss": "loss and output head",
    "optimizer": "optimizer",
    "offload": "offload, exposed",
    "exchange": "exchange, exposed",
    "fsdp": "sharded parameters, exposed",
}
"""In words, the fields of `Seconds`."""
assert list(PARTS) == [field.name for field in fields(Seconds)]


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything, in bytes, seconds and hours."""
    data = asdict(plan) | {"settings": plan.settings.model_dump()}
    for stage, data_of in zip(plan.stages, data["stages"], strict=True):
        data_of["memory"]["peak"] = stage.memory.peak
        data_of["step"]["total"] = stage.step.total
    if plan.suggestion is not None:
        settings = plan.suggestion.settings.model_dump()
        data["suggestion"] |= {"settings": settings, "arguments": plan.suggestion.arguments}
    return data | {"hours": plan.hours, "gpu_hours": plan.gpu_hours}


def show(plan: Plan) -> str:
    """Aligned text."""
    sections = [_run(plan), _memory(plan), _sent(plan), _time(plan), _fit(plan), _assumptions(plan)]
    return "\n".join("".join(f"{line.rstrip()}\n" for line in section) for section in sections)


def _run(plan: Plan) -> Iterator[str]:
    c = plan.constraints
    nodes = -(-plan.gpus // plan.gpus_per_node)
    yield f"{plan.gpus} x {plan.gpu} in {nodes} node(s): dp {plan.dp} x cp {plan.cp}, {plan.parameters:,} parameters"
    padded = f", padded to {c.padded_len:,}" if c.padded_len > c.seq_len else ", no padding"
    yield f"  sequence       {c.seq_len:,} tokens{padded}; {c.chunks} chunk(s)"
    yield f"  GPU and step   {plan.passes} micro-batch(es) of {plan.micro_batch_tokens:,} tokens"
    if c.subsequence is not None:
        share = c.padded_len / c.subsequence
        yield f"  sub-sequence   S = {c.subsequence:,}, 1/{share:.1f} of the sequence"
        yield f"  strata         {c.strata}, of m = {c.budget} selected entries per level and KV head"
    yield f"  cp can be      {', '.join(map(str, c.valid_cp))} (on {plan.gpus} GPUs, with these strata and this batch)"


def _memory(plan: Plan) -> Iterator[str]:
    yield _line("Memory of one GPU, GiB", _names(plan.stages))
    always = plan.stages[0].memory.always
    for name in always:
        yield _line(f"  {name}", [_gib(stage.memory.always[name]) for stage in plan.stages])
    for name in {name: None for stage in plan.stages for name in stage.memory.kept}:
        yield _line(f"  kept: {name}", [_gib(stage.memory.kept.get(name, 0)) for stage in plan.stages])
    yield _line("  needed at the peak besides", [_gib(sum(s.memory.working.values())) for s in plan.stages])
    yield _line("  peak", [_gib(stage.memory.peak) for stage in plan.stages])
    shares = [_of(stage.memory.peak, plan.usable_bytes) for stage in plan.stages]
    yield _line(f"  of usable {plan.usable_bytes / GIB:.1f}", shares)
    yield _line("Pinned host memory for one GPU, GiB", [_gib(stage.memory.host) for stage in plan.stages])
    per_node = [_gib(stage.memory.host * plan.gpus_per_node) for stage in plan.stages]
    yield _line(f"  for the {plan.gpus_per_node} of a node", per_node)
    moments: dict[str, StagePlan] = {}
    for stage in plan.stages:
        moments.setdefault(f"{stage.mode}: {stage.memory.moment}", stage)
    for when, stage in moments.items():
        yield f"  at the peak of {when}"
        for name, size in stage.memory.working.items():
            if size:
                yield _line(f"    {name}", [_gib(size)])


def _sent(plan: Plan) -> Iterator[str]:
    if plan.cp == 1:
        yield "Between ranks that share a sequence: nothing, cp is 1"
        return
    yield _line("Sent by a rank, per layer and step, MB", ["forward", "backward"])
    for kind, by_exchange in plan.sent.items():
        for name, sent in by_exchange.items():
            used = " (used)" if name == plan.exchange else ""
            yield _line(f"  {kind} layer, {name}{used}", _megabytes(sent))


def _megabytes(sent: Bytes | None) -> list[str]:
    """Of forward and backward; `-` where an exchange does not take the model's heads."""
    return ["-", "-"] if sent is None else [f"{sent.forward / 1e6:,.1f}", f"{sent.backward / 1e6:,.1f}"]


def _time(plan: Plan) -> Iterator[str]:
    yield _line("Seconds of a step", _names(plan.stages))
    for name, words in PARTS.items():
        values = [getattr(stage.step, name) for stage in plan.stages]
        if any(values):
            yield _line(f"  {words}", [f"{value:.3f}" for value in values])
    yield _line("  step", [f"{stage.step.total:.3f}" for stage in plan.stages])
    yield _line("tokens/s/GPU", [f"{stage.tokens_per_s_per_gpu:,.0f}" for stage in plan.stages])
    yield _line("MFU", [f"{stage.mfu:.1%}" for stage in plan.stages])
    yield _line("steps", [f"{stage.steps:,}" for stage in plan.stages])
    yield _line("hours", [f"{stage.hours:,.1f}" for stage in plan.stages])
    yield _line("GPU-hours", [f"{stage.gpu_hours:,.1f}" for stage in plan.stages])
    yield _line("share of the hours", [_of(stage.hours, plan.hours) for stage in plan.stages])
    yield f"in all {plan.hours:,.1f} hours, {plan.gpu_hours:,.1f} GPU-hours, without evaluations and starts"


def _fit(plan: Plan) -> Iterator[str]:
    memory = plan.settings
    layers = "all" if memory.recompute_layers is None else memory.recompute_layers
    verdict = "fits" if plan.fits else "does not fit"
    now = f"recompute {memory.recompute}, recompute_layers {layers}, offload_layers {memory.offload_layers}"
    yield f"As configured ({now}) it {verdict}."
    best = plan.suggestion
    if best is None:
        yield "No setting of `memory` makes it fit: raise parallel.cp, lower micro_batch_size, or take larger GPUs."
        return
    if plan.fits and f"{best.hours:.4g}" == f"{plan.hours:.4g}":
        yield "Nothing that fits takes less time."
        return
    hours = f"{best.hours:,.4g} hours" + (f" instead of {plan.hours:,.4g}" if plan.fits else "")
    yield f"Fastest that fits: {hours}, {_gib(best.peak)} GiB on a GPU, {_gib(best.host)} pinned"
    yield f"  {best.arguments}"


def _assumptions(plan: Plan) -> Iterator[str]:
    yield "Assumed"
    for name, value, unit, source in plan.assumptions:
        yield f"  {name:24}{value:>10.4g} {unit:20} {source}"
    yield "  Rates are an H100's share of its peak, taken for every GPU. A layer's transfers run beside its compute;"
    yield "  what exceeds it is exposed. Not counted: starts, evaluations, checkpoints, the embedding, gradient norms."


def _names(stages: Sequence[StagePlan]) -> list[str]:
    return [stage.mode for stage in stages]


def _line(label: str, cells: Sequence[str]) -> str:
    return f"{label:60}" + "".join(f"{cell:>12}" for cell in cells)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _of(part: float, whole: float) -> str:
    return f"{part / whole:.0%}"
