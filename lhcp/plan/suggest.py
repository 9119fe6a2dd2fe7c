"""The memory settings that make a run fit, and cost least time."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from lhcp.config import MemoryConfig, RecomputeMode, RunConfig
from lhcp.plan.gpus import Gpu
from lhcp.plan.memory import Memory, memory_of
from lhcp.plan.share import Share, layers_of
from lhcp.plan.time import step_time


@dataclass(frozen=True)
class Suggestion:
    """Memory settings, and what they come to."""

    settings: MemoryConfig
    hours: float
    """Of all stages."""
    peak: int
    """Bytes on a GPU, of the stage that needs most."""
    host: int
    """Pinned bytes for a GPU."""

    @property
    def arguments(self) -> str:
        """For the command line; `recompute_layers` is given as null, too, since the file may have another."""
        memory = self.settings
        layers = "null" if memory.recompute_layers is None else memory.recompute_layers
        return (
            f"--set memory.recompute={memory.recompute} --set memory.recompute_layers={layers} "
            f"--set memory.offload_layers={memory.offload_layers}"
        )


def fits(memory: Memory, gpu: Gpu) -> bool:
    """Whether the GPU and its share of the host have as much."""
    return memory.peak <= gpu.usable_bytes and memory.host <= gpu.host_bytes


def evaluate(run: RunConfig, share: Share, gpu: Gpu, memory: MemoryConfig) -> Suggestion | None:
    """These settings, if every stage fits."""
    hours, peak, host = 0.0, 0, 0
    for stage in run.stages:
        layers = layers_of(run, memory, stage.mode)
        needed = memory_of(share, layers)
        if not fits(needed, gpu):
            return None
        hours += stage.steps * step_time(share, gpu, layers).total / 3600
        peak, host = max(peak, needed.peak), max(host, needed.host)
    return Suggestion(memory, hours, peak, host)


def suggest(run: RunConfig, share: Share, gpu: Gpu) -> Suggestion | None:
    """Of the settings that fit, those of the least predicted time; of equals, least host memory, then least on the GPU.

    Recomputing takes time, so nothing is faster than `none`. Each input that is offloaded takes no less time and no
    more of the GPU's memory, so the fewest that fit are best.

    Args:
        run: resolved; its micro-batch stays.
        share: its share.
        gpu: which.

    Returns:
        None where nothing fits.
    """
    if best := evaluate(run, share, gpu, MemoryConfig()):
        return best
    modes: tuple[RecomputeMode, ...] = ("selective", "full")
    counts = range(1, run.model.num_layers + 1)
    found = [_fewest_offloaded(run, share, gpu, mode, count) for mode in modes for count in counts]
    return min((one for one in found if one), key=_cost, default=None)


def _fewest_offloaded(run: RunConfig, share: Share, gpu: Gpu, mode: RecomputeMode, count: int) -> Suggestion | None:
    layers = None if count == run.model.num_layers else count

    def memory(offloaded: int) -> MemoryConfig:
        return MemoryConfig(recompute=mode, recompute_layers=layers, offload_layers=offloaded)

    def on_gpu(offloaded: int) -> bool:
        needed = (memory_of(share, layers_of(run, memory(offloaded), stage.mode)) for stage in run.stages)
        return all(one.peak <= gpu.usable_bytes for one in needed)

    fewest = bisect_left(range(count + 1), True, key=on_gpu)
    return evaluate(run, share, gpu, memory(fewest)) if fewest <= count else None


def _cost(one: Suggestion) -> tuple[float, int, int]:
    return float(f"{one.hours:.9g}"), one.host, one.peak  # equal sums, added up in another order, differ in last digits
