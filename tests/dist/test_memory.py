"""Sharded parameters, mixed precision, and recomputation: what is held, what is rounded, what runs twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lhcp.attention.layers import AttentionFunction
from lhcp.config import RunConfig
from lhcp.distributed.halo import Halo
from lhcp.kernels.lighthouse import reference
from lhcp.model import llama
from lhcp.parallelize import full
from ranks import run_ranks
from runs import largest_error, make_config, make_trainer, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def bytes_held(config: RunConfig, rank: int) -> tuple[int, int, bool]:
    """Bytes of parameters, gradients and optimizer state here and in all, and whether all are DTensors."""
    trainer = make_trainer(config)
    trainer.train_step()
    state = [x for s in trainer.optimizer.state.values() for x in (s["exp_avg"], s["exp_avg_sq"])]
    tensors = [*trainer.model.parameters(), *(p.grad for p in trainer.model.parameters()), *state]
    local = sum(x.to_local().nbytes for x in tensors if isinstance(x, DTensor))
    return local, sum(x.numel() * x.element_size() for x in tensors), all(isinstance(x, DTensor) for x in tensors)


@pytest.mark.parametrize(("dp", "cp"), [(4, 1), (2, 2), (1, 4)])
def test_each_rank_holds_its_share(data: Path, dp: int, cp: int) -> None:
    """Every first dimension of this model is a multiple of 4 (vocabulary 260): shares are exactly a quarter."""
    model = make_config(data, 1, 1).model.model_dump() | {"vocab_size": 260}
    for local, whole, sharded in run_ranks(4, partial(bytes_held, make_config(data, dp, cp, model=model, eval={}))):
        assert sharded
        assert local * 4 == whole


def gradients(config: RunConfig, rank: int) -> tuple[dict[str, Tensor], int, int]:
    """Gradients of a Lighthouse step, how often a layer selected, and how often it asked its neighbours for rows."""
    trainer, calls = make_trainer(config), Counter[str]()

    def counted(name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counting(*args: Any) -> Tensor:
            calls[name] += 1
            return original(*args)

        return counting

    reference.select = counted("select", reference.select)
    Halo.neighbours = counted("halo", Halo.neighbours)  # type: ignore[method-assign]
    trainer.gradients(0, trainer.attention("lighthouse"))
    return {name: full(p.grad) for name, p in trainer.model.named_parameters()}, calls["select"], calls["halo"]


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize(("dp", "cp"), [(1, 1), (1, 2), (2, 2)])
def test_recomputation_changes_nothing_and_selects_and_meets_once(data: Path, dp: int, cp: int, mode: str) -> None:
    config = make_config(data, dp, cp)
    ((reference, selected, met), *_) = run_ranks(dp * cp, partial(gradients, config))
    recomputing = make_config(data, dp, cp, memory={"recompute": mode})
    assert selected == 2 * 4 // dp  # layers 1 and 2, in each of this replica's passes
    assert met == (2 * selected if cp > 1 else 0)  # forward and backward
    for values, selected_now, met_now in run_ranks(dp * cp, partial(gradients, recomputing)):
        assert (selected_now, met_now) == (selected, met)
        assert largest_error(values, reference) <= 1e-12


def bf16_run(config: RunConfig, rank: int) -> tuple[list[float], set[torch.dtype], set[torch.dtype], set[torch.dtype]]:
    """Losses of a few steps, the dtypes of the weights, of the rows that attention receives, and of RoPE's tables."""
    trainer, seen, tables = make_trainer(config), set(), set()
    rope, attentions = llama.apply_rope, trainer.attention

    def watching_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tables.update((cos.dtype, sin.dtype))
        return rope(x, cos, sin)

    llama.apply_rope = watching_rope

    def watched(function: AttentionFunction) -> AttentionFunction:
        def watching(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen.update((q.dtype, k.dtype, v.dtype))
            return function(q, k, v)

        return watching

    trainer.attention = lambda mode: [watched(function) for function in attentions(mode)]
    losses = [trainer.train_step()[0] for step in range(6)]
    return losses, {p.dtype for p in trainer.model.parameters()}, seen, tables


def test_bfloat16_compute_keeps_float32_weights(data: Path) -> None:
    plain, mixed = (
        run_ranks(2, partial(bf16_run, make_config(data, 1, 2, dtype="float32", compute_dtype=compute)))[0]
        for compute in (None, "bfloat16")
    )
    assert plain[1:] == ({torch.float32}, {torch.float32}, {torch.float32})
    assert mixed[1:] == ({torch.float32}, {torch.bfloat16}, {torch.float32})
    assert mixed[0] == pytest.approx(plain[0], rel=5e-3)
    assert mixed[0] != plain[0]
