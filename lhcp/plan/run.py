"""The plan of a run: its constraints, and each stage's memory, time and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from lhcp import volume
from lhcp.config import ConfigError, ExchangeName, MemoryConfig, RunConfig, StageConfig, StageMode
from lhcp.config.parallel import ulysses_copies
from lhcp.flops import step_flops
from lhcp.plan.gpus import Assumption, Gpu
from lhcp.plan.memory import Memory, memory_of
from lhcp.plan.share import Share, layers_of, share_of
from lhcp.plan.suggest import Suggestion, fits, suggest
from lhcp.plan.time import Seconds, step_time, tensors

EXCHANGES: tuple[ExchangeName, ...] = get_args(ExchangeName)


@dataclass(frozen=True)
class Constraints:
    """What the configuration came to."""

    seq_len: int
    padded_len: int
    chunks: int
    """Runs of tokens of a sequence."""
    valid_cp: tuple[int, ...]
    """Context-parallel degrees that this run can have on as many GPUs."""
    subsequence: int | None
    """S; None, here and below: no stage uses Lighthouse attention."""
    strata: int | None
    budget: int | None
    """m, entries selected in a stratum, per level and KV head."""


@dataclass(frozen=True)
class StagePlan:
    """One stage."""

    mode: StageMode
    steps: int
    memory: Memory
    """Bytes."""
    step: Seconds
    """Of one optimizer step."""
    tokens_per_s_per_gpu: float
    mfu: float
    """Of the GPU's dense bfloat16 peak; recomputation does not count."""
    hours: float
    gpu_hours: float


@dataclass(frozen=True)
class Plan:
    """A run on a number of GPUs."""

    gpu: str
    gpus: int
    gpus_per_node: int
    dp: int
    cp: int
    parameters: int
    passes: int
    """Micro-batches of an optimizer step."""
    micro_batch_tokens: int
    """On one GPU, padding included."""
    exchange: ExchangeName
    """That the times are of."""
    settings: MemoryConfig
    constraints: Constraints
    sent: Mapping[StageMode, Mapping[ExchangeName, volume.Bytes | None]]
    """Bytes of the rank that sends most, for one layer of a kind in a step; None: the heads do not allow it."""
    stages: tuple[StagePlan, ...]
    usable_bytes: float
    """Of a GPU's memory."""
    host_bytes: float
    """Of host memory, that can be pinned for one GPU."""
    fits: bool
    suggestion: Suggestion | None
    """The fastest memory settings that fit; None: none do."""
    assumptions: tuple[Assumption, ...]

    @property
    def hours(self) -> float:
        """Of all stages."""
        return sum(stage.hours for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        """Of all stages."""
        return self.hours * self.gpus


def plan_run(run: RunConfig, gpus: int, gpu: Gpu, gpus_per_node: int = 8) -> Plan:
    """What `run` needs on `gpus` GPUs.

    Raises:
        ConfigError: the run is not legal there, or not of the kind that is predicted.
    """
    _check_kind(run)
    run = run.resolve(gpus)
    share = share_of(run, gpus, gpus_per_node)
    stages = tuple(_stage(run, share, gpu, stage) for stage in run.stages)
    assert run.parallel.dp is not None
    return Plan(
        gpu=gpu.name,
        gpus=gpus,
        gpus_per_node=min(gpus, gpus_per_node),
        dp=run.parallel.dp,
        cp=share.cp,
        parameters=share.parameters,
        passes=share.passes,
        micro_batch_tokens=share.tokens,
        exchange=share.exchange,
        settings=run.memory,
        constraints=_constraints(run, gpus),
        sent=_sent(run, share),
        stages=stages,
        usable_bytes=gpu.usable_bytes,
        host_bytes=gpu.host_bytes,
        fits=all(fits(stage.memory, gpu) for stage in stages),
        suggestion=suggest(run, share, gpu),
        assumptions=tuple(gpu.assumptions()),
    )


def _check_kind(run: RunConfig) -> None:
    """Refuse what there are no rates of."""
    needed = {
        "device": "cuda",
        "compute_dtype": "bfloat16",
        "dtype": "float32",
        "compile": "null --set attention.check_finite=false",
    }
    given = {
        "device": run.device,
        "compute_dtype": run.activation_dtype,
        "dtype": run.dtype,
        "compile": run.compiles("cuda"),
    }
    wrong = [
        key
        for key, values in {
            "device": ("cuda", "auto"), "compute_dtype": ("bfloat16",), "dtype": ("float32",), "compile": (True,),
        }.items()
        if given[key] not in values
    ]  # fmt: skip
    if wrong:
        what = ", ".join(f"{key} is {str(given[key]).lower()}" for key in wrong)
        remedy = " ".join(f"--set {key}={needed[key]}" for key in wrong)
        raise ConfigError(f"a plan is of compiled bfloat16 training on GPUs with float32 weights, but {what}; {remedy}")


def _stage(run: RunConfig, share: Share, gpu: Gpu, stage: StageConfig) -> StagePlan:
    layers = layers_of(run, run.memory, stage.mode)
    step = step_time(share, gpu, layers)
    hours = stage.steps * step.total / 3600
    return StagePlan(
        mode=stage.mode,
        steps=stage.steps,
        memory=memory_of(share, layers),
        step=step,
        tokens_per_s_per_gpu=run.seq_len * run.global_batch_size / step.total / share.ranks,
        mfu=step_flops(run, stage.mode) / (step.total * share.ranks * gpu.peak_flops),
        hours=hours,
        gpu_hours=hours * share.ranks,
    )


def _constraints(run: RunConfig, gpus: int) -> Constraints:
    sparse = any(stage.mode == "lighthouse" for stage in run.stages)
    attention = run.attention
    return Constraints(
        seq_len=run.seq_len,
        padded_len=run.padded_len,
        chunks=run.parallel.num_chunks,
        valid_cp=tuple(cp for cp in range(1, gpus + 1) if gpus % cp == 0 and _is_legal(run, gpus, cp)),
        subsequence=attention.subsequence_length(run.padded_len) if sparse else None,
        strata=attention.strata if sparse else None,
        budget=attention.topk // attention.strata if sparse else None,
    )


def _is_legal(run: RunConfig, gpus: int, cp: int) -> bool:
    try:
        run.model_copy(update={"parallel": run.parallel.model_copy(update={"dp": None, "cp": cp})}).resolve(gpus)
    except ConfigError:
        return False
    return True


def _sent(run: RunConfig, share: Share) -> dict[StageMode, dict[ExchangeName, volume.Bytes | None]]:
    """By kind and exchange, of the rank that sends most; the exchange of a `full` recomputation counts as backward."""
    kinds: list[StageMode] = ["lighthouse"] if share.attention else []
    if run.dense_layers or any(stage.mode == "dense" for stage in run.stages):
        kinds.append("dense")
    return {kind: {name: _sent_by(run, share, kind, name) for name in EXCHANGES} for kind in kinds}


def _sent_by(run: RunConfig, share: Share, kind: StageMode, exchange: ExchangeName) -> volume.Bytes | None:
    if exchange == "ulysses":
        try:
            ulysses_copies(share.cp, share.heads, share.kv_heads)
        except ConfigError:
            return None
    attention = share.attention if kind == "lighthouse" else None
    of = tensors(share)
    layer = volume.layer_bytes(exchange, attention, share.cp, share.chunks_per_rank, share.length, of)
    again = volume.exchange_bytes(exchange, share.cp, share.chunks_per_rank, share.attended(kind), of).forward
    backward = layer.backward + (again if run.memory.recompute == "full" else 0)
    return volume.Bytes(layer.forward * share.passes, backward * share.passes)
