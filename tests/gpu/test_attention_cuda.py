"""The CUDA path: stock block kernels, blocks that add up, and the layer, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lhcp.attention import LighthouseConfig, lighthouse_attention, select, select_from_scores
from lhcp.distributed import ContextParallel
from lhcp.distributed.exchange.block import block_backend
from lhcp.distributed.exchange.merge import Merge, Sum
from lhcp.distributed.exchange.ring import visible_block
from lhcp.distributed.sharding import ChunkLayout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

N, HEADS, WIDTH = 1024, 8, 128


def tensors(kv_heads: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """q, k, v and the output's gradient, as strided views of one fused projection."""
    generator = torch.Generator("cuda").manual_seed(kv_heads)
    fused = torch.randn(2, N, 2 * HEADS + 2 * kv_heads, WIDTH, device="cuda", generator=generator).to(dtype)
    return fused.split((HEADS, kv_heads, kv_heads, HEADS), dim=2)


def relative(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


def dense(backend: Any, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    block = block_backend(backend, q)
    out, lse = block.forward(q, k, v, causal=True)
    return out, lse, *block.backward(grad, q, k, v, out, lse, causal=True)


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("backend", ["cudnn", "flash", "auto"])
def test_block_is_as_exact_as_bfloat16_allows(backend: str, kv_heads: int) -> None:
    """Error against float64 at most twice that of plain PyTorch in bfloat16 with float32 accumulation."""
    *qkv, grad = tensors(kv_heads)
    exact = dense("math", *(x.double() for x in (*qkv, grad)))
    plain = dense("math", *qkv, grad)
    for value, other, reference in zip(dense(backend, *qkv, grad), plain, exact, strict=True):
        assert value.shape == reference.shape
        # The plain path keeps the softmax in float32, where fused kernels round it to bfloat16 once.
        assert relative(value, reference) <= 2 * max(relative(other, reference), 2**-9)


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("backend", ["cudnn", "flash"])
@pytest.mark.parametrize("sharding", ["zigzag", "contiguous"])
def test_ring_blocks_add_up(sharding: Any, backend: Any, kv_heads: int) -> None:
    """Every rank's ring steps in turn, on one device: output and gradients of the whole."""
    world = 4
    q, k, v, grad = tensors(kv_heads)
    exact = dense("math", *(x.double() for x in (q, k, v, grad)))
    whole = dense(backend, q, k, v, grad)
    layout = ChunkLayout(world, sharding)
    own = [torch.cat([torch.arange(*run) for run in layout.runs(r, N)]).cuda() for r in range(world)]
    shards = [tuple(x[:, rows] for x in (q, k, v, grad)) for rows in own]
    block = block_backend(backend, q)
    out = torch.zeros(q.shape, device="cuda")
    dk, dv = (torch.zeros(x.shape, device="cuda") for x in (k, v))
    dq = torch.zeros_like(q)
    for rank in range(world):
        q_, k_, v_, grad_ = shards[rank]
        merge, dq_of_rank = Merge(q_), Sum(q_)
        merge.add(*block.forward(q_, k_, v_, causal=True))
        parts = [(s, visible_block(layout, rank, s, q_.shape[1])) for s in range(world) if s != rank]
        steps = [(s, part.queries, part.keys) for s, part in parts if part is not None]
        for source, rows, keys in steps:
            new, new_lse = block.forward(q_[:, rows], shards[source][1][:, keys], shards[source][2][:, keys], False)
            merge.add(new, new_lse, rows)
        rounded, lse = merge.result()
        out[:, own[rank]] = rounded.float()
        first, *gradients = block.backward(grad_, q_, k_, v_, rounded, lse, causal=True)
        dq_of_rank.add(first)
        for target, value in zip((dk, dv), gradients, strict=True):
            target[:, own[rank]] += value
        for source, rows, keys in steps:
            dq_, dk_, dv_ = block.backward(
                grad_[:, rows], q_[:, rows], shards[source][1][:, keys], shards[source][2][:, keys],
                rounded[:, rows], lse[..., rows].contiguous(), causal=False,
            )  # fmt: skip
            dq_of_rank.add(dq_, rows)
            dk[:, own[source][keys]] += dk_
            dv[:, own[source][keys]] += dv_
        dq[:, own[rank]] = dq_of_rank.result()
    for value, one, reference in zip((out, dq, dk, dv), (whole[0], *whole[2:]), (exact[0], *exact[2:]), strict=True):
        assert relative(value, reference) <= 1.5 * relative(one, reference)


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_layer_against_float64_at_one_selection(kv_heads: int) -> None:
    config = LighthouseConfig(num_levels=3, pooling_factor=4, topk=32, num_strata=4)
    *qkv, grad = tensors(kv_heads)
    selection = select(qkv[0], qkv[1], config)

    def run(dtype: torch.dtype, cp: ContextParallel) -> list[Tensor]:
        inputs = [x.to(dtype).detach().requires_grad_() for x in qkv]
        out = lighthouse_attention(*inputs, config, selection=selection, context_parallel=cp)
        return [out, *torch.autograd.grad(out, inputs, grad.to(dtype))]

    exact = run(torch.float64, ContextParallel(block_backend="math"))
    plain = run(torch.bfloat16, ContextParallel(block_backend="math"))
    for value, other, reference in zip(run(torch.bfloat16, ContextParallel()), plain, exact, strict=True):
        assert relative(value, reference) <= 2 * relative(other, reference)


def test_selection_is_that_of_the_cpu() -> None:
    config = LighthouseConfig(num_levels=4, pooling_factor=4, topk=16, num_strata=4)
    scores = torch.randint(0, 50, (2, 2, 3, 4096)).float()
    on_cpu = select_from_scores(scores[0], scores[1], config)
    on_gpu = select_from_scores(scores[0].cuda(), scores[1].cuda(), config)
    assert torch.equal(on_gpu.entries.cpu(), on_cpu.entries)
