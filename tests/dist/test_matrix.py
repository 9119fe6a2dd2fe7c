"""CP=1 equals CP=W, the full product: degree, exchange, sharding, grouped queries, dense and both scorers, odd lengths.

Over real processes (gloo), one set of them for each degree. An odd length is padded: dense attention is compared with
that of the sequence itself, Lighthouse with one process at the padded length.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lhcp.attention import LighthouseConfig, lighthouse_attention, select
from lhcp.config import ConfigError, ExchangeName, Sharding
from lhcp.distributed import ContextParallel
from lhcp.distributed.exchange.ulysses import HeadSwap
from lhcp.distributed.sharding import ChunkLayout
from lhcp.distributed.threads import ThreadCommunicator, run_threads
from ranks import run_ranks

BATCH, HEADS, WIDTH = 2, 8, 4
# 16 strata, as many as chunks at the highest degree, of two coarsest windows of 9 tokens: 288 tokens.
PYRAMID = LighthouseConfig(num_levels=3, pooling_factor=3, topk=32, num_strata=16)
KINDS = {
    "dense": None,
    "norm": PYRAMID,
    "dilated": PYRAMID.model_copy(update={"scorer": "dilated", "dilation": 3}),
}
WORLDS = (1, 2, 4, 8)


class Case(NamedTuple):
    """All but the degree."""

    exchange: ExchangeName
    sharding: Sharding
    kv_heads: int
    kind: str
    length: int


CASES = [
    Case(*values)
    for values in itertools.product(
        ("ring", "allgather", "ulysses"), ("zigzag", "contiguous"), (8, 2, 1), KINDS, (288, 281)
    )
]


@dataclass(frozen=True)
class Result:
    """Of one rank: whether its entries are those of one process; squared errors and norms of output and gradients."""

    same_entries: bool
    errors: list[float]
    norms: list[float]


def inputs(case: Case) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(case.length + case.kv_heads)
    heads = (HEADS, case.kv_heads, case.kv_heads, HEADS)
    return [torch.randn(BATCH, case.length, h, WIDTH, dtype=torch.float64, generator=generator) for h in heads]


def attend(case: Case, cp: ContextParallel, tensors: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """Entries, if any, and output and gradients of this rank's shard of the padded `tensors`."""
    config, (*qkv, grad) = KINDS[case.kind], (cp.shard(x).clone() for x in tensors)
    leaves = [x.requires_grad_() for x in qkv]
    if config is None:
        entries, out = None, cp.attend(*leaves)
    else:
        valid = case.length if case.length < tensors[0].shape[1] else None
        q, k, v = leaves
        entries = select(q, k, config, v=v, context_parallel=cp, valid_len=valid).entries
        out = lighthouse_attention(q, k, v, config, context_parallel=cp, valid_len=valid)
    return entries, [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def padded(x: Tensor, value: float) -> Tensor:
    return F.pad(x, (0, 0, 0, 0, 0, PYRAMID.padded_length(x.shape[1]) - x.shape[1]), value=value)


@cache
def one_process(kind: str, kv_heads: int, length: int) -> tuple[Tensor | None, list[Tensor]]:
    """Padded again for comparison, with what a rank gets for padding that contributes no loss: no gradient."""
    case = Case("ring", "zigzag", kv_heads, kind, length)
    tensors = inputs(case)
    if kind != "dense":
        tensors = [*(padded(x, 7.0) for x in tensors[:3]), padded(tensors[3], 0.0)]
    entries, results = attend(case, ContextParallel(), tensors)
    return entries, [padded(x, 0.0) if kind == "dense" else x for x in results]


def compare(case: Case, cp: ContextParallel) -> Result:
    """What padding holds, 7, must not matter; its output is not compared."""
    tensors = inputs(case)
    tensors = [*(padded(x, 7.0) for x in tensors[:3]), padded(tensors[3], 0.0)]
    expected_entries, expected = one_process(case.kind, case.kv_heads, case.length)
    entries, results = attend(case, cp, tensors)
    same = entries is None or torch.equal(entries, cp.shard(expected_entries, dim=-1))
    real = cp.positions(tensors[0].shape[1]) < case.length
    pairs = [(mine, cp.shard(theirs)) for mine, theirs in zip(results, expected, strict=True)]
    pairs[0] = (pairs[0][0][:, real], pairs[0][1][:, real])
    return Result(
        same,
        [float((mine - theirs).square().sum()) for mine, theirs in pairs],
        [float(theirs.square().sum()) for _, theirs in pairs],
    )


@cache
def results(world: int) -> dict[Case, list[Result]]:
    """By case, of every rank."""
    for case in CASES:  # once, before the processes are forked
        one_process(case.kind, case.kv_heads, case.length)

    def rank_main(rank: int) -> dict[Case, Result]:
        def cp(case: Case) -> ContextParallel:
            return ContextParallel(dist.group.WORLD, case.sharding, case.exchange)

        return {case: compare(case, cp(case)) for case in CASES}

    ranks = run_ranks(world, rank_main, timeout=300)
    return {case: [rank[case] for rank in ranks] for case in CASES}


def named(case: Case) -> str:
    return "-".join(map(str, case))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES, ids=named)
def test_every_degree_computes_what_one_process_does(case: Case, world: int) -> None:
    ranks = results(world)[case]
    assert all(rank.same_entries for rank in ranks)
    for part, name in enumerate(("out", "dq", "dk", "dv")):
        error = math.sqrt(sum(rank.errors[part] for rank in ranks) / sum(rank.norms[part] for rank in ranks))
        assert error <= 1e-10, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "norm"])
@pytest.mark.parametrize("exchange", ["ring", "allgather", "ulysses"])
def test_low_precision_is_as_exact_as_one_process(exchange: ExchangeName, kind: str, dtype: torch.dtype) -> None:
    """Against float64 on the same rounded tensors at one selection: errors at W = 8, by those at W = 1.

    Outputs and gradients of blocks are summed in float32: in bfloat16 sums, dense attention would be 1.3x worse.
    """
    limit = 1.2 if kind == "dense" else 1.5
    case = Case(exchange, "zigzag", 2, kind, 288)
    rounded = [x.to(dtype) for x in inputs(case)]
    config = KINDS[kind]
    selection = None if config is None else select(*rounded[:2], config)

    def run(cp: ContextParallel, tensors: list[Tensor]) -> list[Tensor]:
        *qkv, grad = (cp.shard(x).clone() for x in tensors)
        leaves = [x.requires_grad_() for x in qkv]
        if config is None:
            out = cp.attend(*leaves)
        else:
            out = lighthouse_attention(*leaves, config, selection=cp.shard(selection), context_parallel=cp)
        return [cp.unshard(x).double() for x in (out.detach(), *torch.autograd.grad(out, leaves, grad))]

    exact = run(ContextParallel(), [x.double() for x in rounded])
    one = run(ContextParallel(), rounded)
    many = run_ranks(8, lambda rank: run(ContextParallel(dist.group.WORLD, "zigzag", exchange), rounded))[0]
    for value, alone, reference in zip(many, one, exact, strict=True):
        assert float((value - reference).norm()) <= limit * float((alone - reference).norm())


def test_heads_that_ulysses_cannot_share_are_refused() -> None:
    def rank_main(rank: int) -> None:
        cp = ContextParallel(dist.group.WORLD, exchange="ulysses")
        for heads, kv_heads in ((3, 3), (6, 3)):
            q, k = torch.zeros(1, 4, heads, 2), torch.zeros(1, 4, kv_heads, 2)
            with pytest.raises(ConfigError, match=rf"{heads} query and {kv_heads} KV heads among 2 ranks"):
                cp.attend(q, k, k)

    run_ranks(2, rank_main)


def test_copies_of_a_head_are_summed_in_float32() -> None:
    """Gradients of a KV head on the ranks that share it, in bfloat16, whose sums it could not hold on the way."""
    partial = torch.tensor([256.0, 1.0, -256.0, 1.0])

    def rank_main(communicator: ThreadCommunicator) -> float:
        swap = HeadSwap(communicator, ChunkLayout(4, "zigzag"))
        (total,) = swap.to_tokens((partial[communicator.rank].bfloat16().expand(1, 8, 1, 1), 4))
        return float(total[0, 0, 0, 0])

    assert run_threads(4, rank_main) == [2.0] * 4
