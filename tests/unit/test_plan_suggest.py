"""The settings that `lhcp plan` suggests: they fit, and nothing that fits is faster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lhcp import config_file
from lhcp.config import MemoryConfig, RunConfig
from lhcp.plan import GPUS, Gpu, plan_run, show
from lhcp.plan.gpus import GIB

CONFIGS = Path(__file__).resolve().parents[2] / "launch" / "configs"
DEMO = CONFIGS / "demo.yaml"
ON_GPUS = ("device=cuda", "compute_dtype=bfloat16", "model.vocab_size=512", "stages.0.steps=7", "model.num_layers=5")
LAYERS = 5


def gpu(memory: float, host: float = 1.0, pcie: float = 50e9) -> Gpu:
    """With so many bytes."""
    return replace(GPUS["h100"], memory_gib=memory / GIB, reserve_gib=0.0, host_gib=host, pcie=pcie)


def load(*overrides: str) -> RunConfig:
    return config_file.load(DEMO, (*ON_GPUS, *overrides))


def everything() -> list[MemoryConfig]:
    """Every setting that is legal, written apart from the search."""
    found = []
    for recompute in ("none", "selective", "full"):
        for layers in (None, *range(LAYERS + 1)):
            for offloaded in range(LAYERS + 1):
                recomputed = 0 if recompute == "none" else LAYERS if layers is None else layers
                if offloaded <= recomputed and not (recompute == "none" and layers):
                    found.append(
                        MemoryConfig(recompute=recompute, recompute_layers=layers, offload_layers=offloaded)  # type: ignore[arg-type]
                    )
    return found


def test_the_suggestion_fits_and_nothing_that_fits_is_faster() -> None:
    """Against all settings one by one, at every amount of memory that one of them needs, and one byte less."""
    run = load()
    plans = [
        plan_run(run.model_copy(update={"memory": memory}), 2, gpu(float("inf"), pcie=2e9)) for memory in everything()
    ]
    needs = [max(stage.memory.peak for stage in plan.stages) for plan in plans]
    chosen = set()
    for limit in sorted({need - less for need in needs for less in (0, 1)}):
        fitting = [plan for plan, need in zip(plans, needs, strict=True) if need <= limit]
        found = plan_run(run, 2, gpu(limit, pcie=2e9))
        assert (found.suggestion is None) == (not fitting)
        if found.suggestion is None:
            assert "No setting of `memory` makes it fit" in show(found)
            continue
        assert found.suggestion.hours == pytest.approx(min(plan.hours for plan in fitting), rel=1e-12)
        assert found.suggestion.peak <= limit
        words = found.suggestion.arguments.split()
        assert words[::2] == ["--set"] * 3
        followed = plan_run(load("memory.recompute=full", *words[1::2]), 2, gpu(limit, pcie=2e9))
        assert followed.fits
        assert followed.hours == pytest.approx(found.suggestion.hours)
        assert followed.settings == found.suggestion.settings
        assert "Nothing that fits takes less time." in show(followed)
        assert found.fits or f"  {found.suggestion.arguments}" in show(found)
        chosen.add((found.suggestion.settings.recompute, found.suggestion.settings.offload_layers > 0))
    assert {"none", "selective", "full"} <= {mode for mode, _ in chosen}
    assert any(offloaded for _, offloaded in chosen)


def test_host_memory_is_limited_too() -> None:
    """At the least that offloading needs on the GPU, where the host has a byte too little for any input."""
    run = load()
    full = [MemoryConfig(recompute="full", offload_layers=offloaded) for offloaded in range(LAYERS + 1)]
    plans = [plan_run(run.model_copy(update={"memory": memory}), 2, gpu(1e12)) for memory in full]
    peaks = [max(stage.memory.peak for stage in plan.stages) for plan in plans]
    row = plans[1].stages[0].memory.host
    assert peaks[-1] < peaks[0]
    needed = peaks.index(peaks[-1]) * row
    assert plan_run(run, 2, gpu(peaks[-1], host=needed / GIB)).suggestion is not None
    assert plan_run(run, 2, gpu(peaks[-1], host=(needed - 1) / GIB)).suggestion is None


def test_a_run_that_cannot_fit_says_what_would_help() -> None:
    found = plan_run(
        config_file.load(CONFIGS / "1m.yaml", ["seq_len=67108864", "memory.recompute=full"]), 32, GPUS["h100"]
    )
    assert not found.fits
    assert found.suggestion is None
    assert "raise parallel.cp" in show(found)
