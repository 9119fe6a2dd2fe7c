"""The layer on the Triton kernels: plain PyTorch's exactness, context parallelism, torch.compile.

Collected like `kernel_cases`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernel_cases import (  # noqa: F401 (fixtures)
    CASES,
    DEVICE,
    INTERPRETED,
    Case,
    _poison_uninitialized_memory,
    _round_as_a_gpu_does,
    assert_as_exact,
    relative,
    using_kernels,
    with_grads,
)
from lhcp.attention import LighthouseConfig, Selection, lighthouse, lighthouse_attention, select, select_from_scores
from lhcp.attention.layers import layer_attentions
from lhcp.config import ModelConfig
from lhcp.distributed import ContextParallel
from lhcp.distributed.exchange.merge import AT_ONCE, Part, add, merge
from lhcp.distributed.exchange.merge_kernel import add_in_one_pass, merge_in_one_pass
from lhcp.kernels.lighthouse import ops, reference
from lhcp.model.llama import Block
from lhcp.model.rope import rope_tables
from ranks import run_ranks


def layer(case: Case, dtype: torch.dtype, selection: Selection) -> list[Tensor]:
    """Output and gradients at a fixed selection, by whatever path dtype and device take."""
    cp = ContextParallel(block_backend="math")
    *qkv, grad = (x.to(dtype) for x in case.tensors(torch.bfloat16))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lighthouse_attention(q, k, v, case.config, selection=selection, context_parallel=cp)

    return with_grads(function, qkv, [grad])


SMALL = {name: case for name, case in CASES.items() if case.tokens < 10_000}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL.keys())
def test_layer(case: Case, dtype: torch.dtype) -> None:
    scores = torch.rand(2, case.batch, case.groups, case.tokens, generator=torch.Generator().manual_seed(3))
    selection = select_from_scores(*scores.to(DEVICE), case.config)
    exact = layer(case, torch.float64, selection)
    with using_kernels():
        values = layer(case, dtype, selection)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lighthouse, "kernels_for", lambda x: reference)
        plain = layer(case, dtype, selection)
    for value, other, expected in zip(values, plain, exact, strict=True):
        assert_as_exact(value, other, expected)


@pytest.mark.skipif(not INTERPRETED, reason="gloo ranks on a CPU")
@pytest.mark.parametrize("sharding", ["zigzag", "contiguous"])
def test_two_ranks_compute_what_one_does(sharding: Any) -> None:
    """Kernels, halo and ring together, in float32."""
    case = Case(1, 216, 2, 1, 6, 3, 3, 2, 4)
    tensors = case.tensors(torch.float32)

    def attend(cp: ContextParallel) -> tuple[Tensor, list[Tensor]]:
        *qkv, grad = (cp.shard(x) for x in tensors)
        with using_kernels():
            selection = select(qkv[0], qkv[1], case.config, context_parallel=cp)

            def function(*qkv: Tensor) -> Tensor:
                return lighthouse_attention(*qkv, case.config, context_parallel=cp)

            results = with_grads(function, qkv, [grad])
        return cp.unshard(selection).entries, [cp.unshard(x) for x in results]

    entries, expected = attend(ContextParallel())
    for other_entries, results in run_ranks(2, lambda rank: attend(ContextParallel(dist.group.WORLD, sharding))):
        assert torch.equal(other_entries, entries)
        assert max(relative(a, b) for a, b in zip(results, expected, strict=True)) <= 1e-6


# --- torch.compile ---


def test_ops_are_registered_as_torch_expects() -> None:
    """Schemas, fake implementations (shapes and strides), autograd, under tracing."""
    case = CASES["L3 p4 GQA"]
    q, k, v, grad = case.tensors(torch.float32)
    rows, inverse = case.index()
    numbers = (case.levels, case.p)
    pooled, _ = ops.pool(q, k, v, case.shape, scores=False)
    sub = torch.randn(case.batch, rows.shape[-1], case.heads, case.width, device=DEVICE, requires_grad=True)
    small = torch.randn(case.batch, rows.shape[-1], case.groups, case.width, device=DEVICE)
    halo = torch.randn(2, case.levels - 1, case.batch, case.heads, case.width, device=DEVICE, requires_grad=True)
    qkv = [x.clone().requires_grad_() for x in (q, k, v)]
    samples: list[tuple[Any, tuple[Any, ...]]] = [
        (torch.ops.lhcp.pool, (q, k, v, *numbers, True)),
        (torch.ops.lhcp.score, (q, case.groups, *numbers)),
        (torch.ops.lhcp.select, (*case.bits(), case.tokens, *numbers, case.strata, case.budget, True, True)),
        (torch.ops.lhcp.gather, (*qkv, *pooled, rows, inverse, *numbers)),
        (torch.ops.lhcp.gather_backward, (sub.detach(), small, small, inverse, case.tokens, *numbers)),
        (torch.ops.lhcp.scatter_back, (sub, rows, inverse, halo, case.tokens, *numbers, 2)),
        (torch.ops.lhcp.scatter_back, (sub, rows, inverse, None, case.tokens, *numbers, 1)),
        (torch.ops.lhcp.scatter_back_backward, (grad, rows, *numbers, 2)),
        (torch.ops.lhcp.attend, (*qkv, ContextParallel()._attend.name)),
    ]
    for op, arguments in samples:
        torch.library.opcheck(op.default, arguments)


def test_a_block_compiles_whole() -> None:
    """No graph break in a transformer block; output and gradients are those of the eager block."""
    torch.manual_seed(0)
    model = ModelConfig(dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, vocab_size=256)
    block = Block(model).to(DEVICE)
    config = LighthouseConfig(num_levels=3, pooling_factor=2, topk=8, num_strata=2)
    (attention,) = layer_attentions(1, ContextParallel(), config)
    x = torch.randn(2, 64, 32, device=DEVICE)
    cos, sin = rope_tables(torch.arange(64, device=DEVICE), 8, 10_000.0, torch.float32, None)
    weights = list(block.parameters())

    def run(function: Any) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        out = function(leaf, cos, sin, attention)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [leaf, *weights])]

    with using_kernels():
        eager = run(block)
        compiled = run(torch.compile(block, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor"))
    for value, expected in zip(compiled, eager, strict=True):
        assert relative(value, expected) <= 1e-5


@pytest.mark.parametrize("count", [1, AT_ONCE])
@pytest.mark.parametrize("width", [4, 24])
def test_blocks_are_merged_as_plain_pytorch_does(width: int, count: int) -> None:
    """Blocks of all rows and of some, which lie head by head, in bfloat16 and in float32."""
    batch, n, heads = 2, 37, 3
    generator = torch.Generator().manual_seed(width)

    def part(row: int, rows: int) -> Part:
        x, lse = (torch.randn(batch, heads, rows, *of, generator=generator).to(DEVICE) for of in ((width,), ()))
        return Part((x if row == 0 else x.bfloat16()).transpose(1, 2), row, lse=3 * lse)

    parts = [part(0, n), part(5, n - 5), part(0, n), part(20, 3), part(36, 1)][:count]
    exact = [Part(x.x.double(), x.row, lse=x.lse.double()) for x in parts if x.lse is not None]
    expected = [torch.empty(batch, *of, device=DEVICE).double() for of in ((n, heads, width), (heads, n))]
    merge(*expected, exact)
    apart = torch.empty(batch, n, heads, width, device=DEVICE)
    first = Part(torch.empty_like(apart).copy_(parts[0].x), lse=parts[0].lse)
    for out, merged in ((apart, parts), (first.x, [first, *parts[1:]])):  # apart from the parts, and in the first
        lse = torch.empty(batch, heads, n, device=DEVICE)
        merge_in_one_pass(out, lse, merged)
        for value, reference_value in zip((out, lse), expected, strict=True):
            torch.testing.assert_close(value.double(), reference_value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, AT_ONCE])
@pytest.mark.parametrize("width", [4, 24])
def test_blocks_gradients_are_added_as_plain_pytorch_does(width: int, count: int) -> None:
    """To the bit, of some rows and heads each, rounded to bfloat16 and not; zeros where there are none."""
    batch, n, heads = 2, 37, 3
    generator = torch.Generator().manual_seed(width)

    def part(row: int, rows: int, head: int, of: int) -> Part:
        x = torch.randn(batch, of, rows, width, generator=generator).to(DEVICE)
        return Part((x if row == 1 else x.bfloat16()).transpose(1, 2), row, head)

    parts = [part(1, 35, 0, 3), part(5, 32, 0, 3), part(0, n, 1, 2), part(20, 3, 2, 1), part(0, 36, 0, 1)][:count]
    whole = torch.randn(batch, n, heads, width, generator=generator)
    for into, dtype in ((None, torch.float32), (None, torch.bfloat16), (Part(whole.to(DEVICE)), torch.float32)):
        added = parts if into is None else [into, *parts[1:]]
        expected = torch.empty(whole.shape, dtype=dtype)
        add(expected, [Part(part.x.cpu(), part.row, part.head) for part in added])
        out = torch.full_like(expected, torch.nan, device=DEVICE) if into is None else into.x
        add_in_one_pass(out, added)
        assert torch.equal(out.cpu(), expected)
