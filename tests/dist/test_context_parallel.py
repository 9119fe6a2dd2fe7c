"""What every layout computes alike: gradients, selections; and what is wrong without the halo. See test_matrix, too."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lhcp.attention import LighthouseConfig, lighthouse_attention, select
from lhcp.config import ConfigError, Sharding
from lhcp.distributed import ContextParallel
from lhcp.distributed.sharding import ChunkLayout
from ranks import run_ranks

SHARDINGS: list[Sharding] = ["zigzag", "contiguous"]
# N = 720 = 8 strata of 90 tokens, 10 coarsest entries each; 8 strata serve every layout up to 4 zigzag ranks.
SEQ_LEN = 720
CONFIG = LighthouseConfig(num_levels=3, pooling_factor=3, topk=40, num_strata=8)


@dataclass(frozen=True)
class Result:
    """What one rank, or one process that holds everything, computes."""

    entries: Tensor
    out: Tensor
    grads: tuple[Tensor, ...]


def inputs(kv_heads: int) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output; batch 2, 4 query heads, an odd multiple of a head width."""
    generator = torch.Generator().manual_seed(kv_heads)
    heads = (4, kv_heads, kv_heads, 4)
    return tuple(torch.randn(2, SEQ_LEN, h, 6, dtype=torch.float64, generator=generator) for h in heads)


def attend(cp: ContextParallel, tensors: tuple[Tensor, ...]) -> Result:
    """Forward and backward of this rank's shard of `tensors`."""
    *qkv, grad = (cp.shard(x) for x in tensors)
    qkv = [x.clone().requires_grad_() for x in qkv]
    entries = select(qkv[0], qkv[1], CONFIG, context_parallel=cp).entries
    out = lighthouse_attention(*qkv, CONFIG, context_parallel=cp)
    out.backward(grad)
    return Result(entries, out.detach(), tuple(x.grad for x in qkv))


@cache
def one_process(kv_heads: int) -> Result:
    return attend(ContextParallel(), inputs(kv_heads))


def many_processes(kv_heads: int, world: int, sharding: Sharding) -> Result:
    def rank_main(rank: int) -> Result:
        return attend(ContextParallel(dist.group.WORLD, sharding), inputs(kv_heads))

    layout = ChunkLayout(world, sharding)
    ranks = run_ranks(world, rank_main)

    def join(parts: list[Tensor], dim: int) -> Tensor:
        chunks = {}
        for rank, part in enumerate(parts):
            chunks.update(zip(layout.chunks(rank), part.chunk(layout.chunks_per_rank, dim), strict=True))
        return torch.cat([chunks[c] for c in range(layout.num_chunks)], dim)

    entries = join([r.entries for r in ranks], -1)
    grads = tuple(join([r.grads[i] for r in ranks], 1) for i in range(3))
    return Result(entries, join([r.out for r in ranks], 1), grads)


def error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def largest_error(result: Result, reference: Result) -> float:
    return max(error(a, b) for a, b in zip((result.out, *result.grads), (reference.out, *reference.grads), strict=True))


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_without_the_halo_the_result_is_wrong(sharding: Sharding, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContextParallel, "halo", lambda self, rows: torch.zeros_like(rows))
    result = many_processes(4, 2, sharding)
    assert torch.equal(result.entries, one_process(4).entries)
    assert error(result.out, one_process(4).out) > 1e-3


@pytest.mark.parametrize("silent", [0, 1])
def test_gradients_are_right_when_a_rank_contributes_no_loss(silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contiguous rank 0 receives no halo, and here one rank has a zero gradient: all must still join."""
    tensors = inputs(4)
    tensors[3][:, silent * SEQ_LEN // 2 : (silent + 1) * SEQ_LEN // 2] = 0
    monkeypatch.setitem(globals(), "inputs", lambda kv_heads: tensors)
    reference = attend(ContextParallel(), tensors)
    assert largest_error(many_processes(4, 2, "contiguous"), reference) <= 1e-10


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_the_gradient_of_a_whole_tensor_is_whole_on_every_rank(sharding: Sharding) -> None:
    """shard -> attention -> unshard -> the same loss on every rank: gradients neither scaled by W nor partial."""

    def rank_main(rank: int) -> tuple[Tensor, ...]:
        cp = ContextParallel(dist.group.WORLD, sharding)
        *qkv, grad = inputs(2)
        qkv = [x.requires_grad_() for x in qkv]
        out = lighthouse_attention(*(cp.shard(x) for x in qkv), CONFIG, context_parallel=cp)
        (cp.unshard(out) * grad).sum().backward()
        return tuple(x.grad for x in qkv)

    reference = one_process(2)
    for grads in run_ranks(2, rank_main):
        assert max(error(a, b) for a, b in zip(grads, reference.grads, strict=True)) <= 1e-10


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_selection_is_sharded_and_reused(sharding: Sharding) -> None:
    def rank_main(rank: int) -> tuple[bool, bool, Tensor]:
        cp = ContextParallel(dist.group.WORLD, sharding)
        q, k, v, _ = inputs(2)
        whole = select(q, k, CONFIG)
        mine = cp.shard(whole)
        own = select(cp.shard(q), cp.shard(k), CONFIG, context_parallel=cp)
        out = lighthouse_attention(cp.shard(q), cp.shard(k), cp.shard(v), CONFIG, selection=mine, context_parallel=cp)
        back = cp.unshard(mine)
        return (
            torch.equal(mine.entries, own.entries),
            torch.equal(back.entries, whole.entries) and back.chunks == tuple(range(cp.layout.num_chunks)),
            cp.unshard(out),
        )

    for same_selection, same_again, out in run_ranks(2, rank_main):
        assert same_selection
        assert same_again
        assert error(out, one_process(2).out) <= 1e-10


def test_half_a_zigzag_shard_is_refused() -> None:
    def rank_main(rank: int) -> None:
        cp = ContextParallel(dist.group.WORLD, "zigzag")
        with pytest.raises(ConfigError, match="a zigzag shard of 3 is not two equal chunks"):
            cp.unshard(torch.zeros(1, 3))
        with pytest.raises(ConfigError, match="a zigzag shard of 3 tokens is not two equal chunks"):
            cp.attend(*(torch.zeros(1, 3, 1, 2) for _ in range(3)))

    run_ranks(2, rank_main)
