"""torch.compile over ranks: exchanges are opaque, so a block of a context-parallel model has no graph break."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lhcp.attention import LighthouseConfig
from lhcp.attention.layers import layer_attentions
from lhcp.config import ExchangeName, ModelConfig, Sharding
from lhcp.distributed import ContextParallel
from lhcp.model.llama import Block
from lhcp.model.rope import rope_tables
from ranks import run_ranks

MODEL = ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=256)
CONFIG = LighthouseConfig(num_levels=3, pooling_factor=2, topk=16, num_strata=4)


@pytest.mark.parametrize(
    ("config", "exchange", "sharding", "backend"),
    [
        (CONFIG, "ring", "zigzag", "aot_eager"),
        (None, "ring", "zigzag", "aot_eager"),
        (None, "ulysses", "zigzag", "aot_eager"),
        # Inductor gives operations another order; here the ranks' graphs differ in what needs what.
        (CONFIG, "ring", "contiguous", "inductor"),
    ],
    ids=["lighthouse", "dense", "ulysses", "contiguous"],
)
def test_a_compiled_block_is_the_eager_one_on_two_ranks(
    config: LighthouseConfig | None, exchange: ExchangeName, sharding: Sharding, backend: str
) -> None:
    """Output and gradients, at two lengths (with Inductor at one)."""

    def rank_main(rank: int) -> list[float]:
        cp = ContextParallel(dist.group.WORLD, sharding, exchange)
        torch.manual_seed(0)
        block = Block(MODEL)
        (attention,) = layer_attentions(1, cp, config)
        compiled = torch.compile(block, fullgraph=True, backend=backend)

        def run(function: Any, length: int) -> list[Tensor]:
            x = torch.randn(1, length, MODEL.dim, generator=torch.Generator().manual_seed(1))
            leaf = cp.shard(x).clone().requires_grad_()
            cos, sin = rope_tables(cp.positions(length), MODEL.head_dim, 10_000.0, torch.float32, None)
            out = function(leaf, cos, sin, attention)
            return [out.detach(), *torch.autograd.grad(out.square().sum(), [leaf, *block.parameters()])]

        errors = []
        for length in (128, 192) if backend == "aot_eager" else (128,):
            pairs = zip(run(compiled, length), run(block, length), strict=True)
            errors += [float((a - b).norm() / b.norm()) for a, b in pairs]
        return errors

    for errors in run_ranks(2, rank_main, timeout=240):
        assert all(error <= 1e-6 for error in errors)


def test_a_rank_without_a_gradient_joins_the_others() -> None:
    """Its output is used by something that hands no gradient back."""

    class Swallow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    def rank_main(rank: int) -> Tensor:
        cp = ContextParallel(dist.group.WORLD, "contiguous")
        x = torch.randn(1, 16, 2, 4, generator=torch.Generator().manual_seed(0))
        q = cp.shard(x).clone().requires_grad_()
        out = cp.attend(q, q, q)
        (Swallow.apply(out) if rank else out).sum().backward()
        return cp.unshard(q.grad)

    x = torch.randn(1, 16, 2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ContextParallel().attend(x, x, x)[:, :8].sum().backward()
    for grad in run_ranks(2, rank_main):
        torch.testing.assert_close(grad, x.grad)


def test_groups_end_with_their_context_parallel() -> None:
    """A process group that is destroyed leaves no threads behind."""

    def rank_main(rank: int) -> list[int]:
        threads = []
        for _ in range(3):
            group = dist.new_group(backend="gloo")
            cp = ContextParallel(group)
            x = torch.randn(1, 8, 1, 4, requires_grad=True)
            out = cp.attend(x, x, x)
            del cp  # the graph that awaits backward keeps what it needs
            out.sum().backward()
            del out
            dist.destroy_process_group(group)
            del group
            gc.collect()
            threads.append(len(os.listdir("/proc/self/task")))  # those of C++, too
        return threads

    for threads in run_ranks(2, rank_main):
        assert threads[0] == threads[-1]


@pytest.mark.parametrize("exchange", ["ring", "allgather", "ulysses"])
def test_ranks_may_need_different_gradients(exchange: ExchangeName) -> None:
    """None is left waiting, and none takes one tensor's message for another's."""
    wanted = ("qk", "qv")

    def gradients(cp: ContextParallel, names: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        tensors = {name: cp.shard(torch.randn(1, 16, 4, 4, generator=generator)).clone() for name in "qkv"}
        for name in names:
            tensors[name].requires_grad_()
        cp.attend(*tensors.values()).square().sum().backward()
        return {name: cp.shard(x.grad) if cp.size == 1 else x.grad for name, x in tensors.items() if name in names}

    reference = gradients(ContextParallel(), "qkv")

    def rank_main(rank: int) -> None:
        cp = ContextParallel(dist.group.WORLD, exchange=exchange)
        for name, grad in gradients(cp, wanted[rank]).items():
            torch.testing.assert_close(grad, cp.shard(reference[name]))

    run_ranks(2, rank_main)
