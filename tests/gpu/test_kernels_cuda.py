"""The Triton kernels compiled and run, at real sizes too; and what only a GPU can show."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from kernel_cases import *  # noqa: F403 (the cases are collected here)
from kernel_layer_cases import *  # noqa: F403
from lhcp.attention import LighthouseConfig, lighthouse, lighthouse_attention, select
from lhcp.distributed import ContextParallel
from lhcp.kernels.lighthouse import kernels_for, ops, reference

pytestmark = pytest.mark.gpu

LONG = LighthouseConfig(num_levels=3, pooling_factor=4, topk=1536).resolve(98_304)


def tensors(tokens: int, heads: tuple[int, int] = (8, 8), dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v, as views of a fused projection, and the output's gradient."""
    generator = torch.Generator("cuda").manual_seed(0)
    query, groups = heads
    fused = torch.randn(1, tokens, query + 2 * groups, 128, device="cuda", generator=generator).to(dtype)
    grad = torch.randn(1, tokens, query, 128, device="cuda", generator=generator).to(dtype)
    return [*fused.split((query, groups, groups), 2), grad]


def layer(config: LighthouseConfig, inputs: list[Tensor]) -> list[Tensor]:
    *qkv, grad = inputs
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = lighthouse_attention(*leaves, config)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_which_path_runs(dtype: torch.dtype) -> None:
    """Kernels, seen by the profiler, in all but float64, which is plain PyTorch by design."""
    config = LighthouseConfig(num_levels=3, pooling_factor=4, topk=64, num_strata=2)
    inputs = [x.to(dtype) for x in tensors(4096)]
    assert kernels_for(inputs[0]) is (reference if dtype == torch.float64 else ops)
    layer(config, inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        layer(config, inputs)
    seen = {event.key for event in profile.key_averages()}
    kernels = {"_pool_kernel", "_select_kernel", "_gather_kernel", "_spread_kernel"}
    assert seen & kernels == (set() if dtype == torch.float64 else kernels)


def test_a_failing_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(ops.pool_kernels, "pool", fails)
    with pytest.raises(RuntimeError, match="out of order"):
        layer(LONG, tensors(98_304))


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=str)
def test_the_same_bits_ten_times(heads: tuple[int, int]) -> None:
    """Each kernel, and under deterministic algorithms (flash instead of cuDNN) the whole layer."""
    q, k, v, grad = tensors(98_304, heads)
    shape = select(q, k, LONG).pyramid

    def kernels() -> list[Tensor]:
        pooled, bits = ops.pool(q, k, v, shape, scores=True)
        assert bits is not None
        rows = ops.select(*bits, shape, LONG.strata, LONG.topk // LONG.strata, True)
        inverse = reference.invert(rows, shape.offsets[-1])
        sub = ops.gather((q, k, v), pooled, rows, inverse, shape)
        grads = torch.ops.lhcp.gather_backward(*sub, inverse, *(shape.length, shape.num_levels, shape.pooling_factor))
        out = ops.scatter_back(sub[0], rows, inverse, shape, 1, None)
        back = torch.ops.lhcp.scatter_back_backward(grad, rows, shape.num_levels, shape.pooling_factor, 1)
        return [*pooled, *bits, rows, *sub, *grads, out, back]

    first = kernels()
    for _ in range(9):
        assert all(torch.equal(a, b) for a, b in zip(kernels(), first, strict=True))
    del first
    torch.use_deterministic_algorithms(True)
    try:
        first = layer(LONG, [q, k, v, grad])
        for _ in range(9):
            assert all(torch.equal(a, b) for a, b in zip(layer(LONG, [q, k, v, grad]), first, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=str)
def test_long_layer_is_as_exact_as_plain_pytorch(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """98,304 tokens: errors against float32 at most twice those of plain PyTorch, at one selection."""
    *qkv, grad = tensors(98_304, heads)
    selection = select(qkv[0], qkv[1], LONG)

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
        out = lighthouse_attention(*leaves, LONG, selection=selection)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    def efficient(self: ContextParallel, *qkv: Tensor) -> Tensor:
        """In float32, where plain products would need S x S scores of every head."""
        q, k, v = (x.transpose(1, 2) for x in qkv)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    values = run(torch.bfloat16)
    monkeypatch.setattr(lighthouse, "kernels_for", lambda x: reference)
    plain = run(torch.bfloat16)
    monkeypatch.setattr(ContextParallel, "attend", efficient)
    exact = run(torch.float32)
    for value, other, expected in zip(values, plain, exact, strict=True):
        assert relative(value, expected) <= 2 * relative(other, expected)  # noqa: F405


def test_rows_beyond_two_to_the_31() -> None:
    """A fused projection of 2^30 x 3 elements: the last tokens are those of a projection of their own."""
    tokens, tail = 2**20, 2**14
    config = LighthouseConfig(num_levels=4, pooling_factor=4, topk=4096, num_strata=64)
    fused = torch.empty(1, tokens, 3, 8, 128, device="cuda", dtype=torch.bfloat16)
    generator = torch.Generator("cuda").manual_seed(0)
    for part in fused.split(2**17, dim=1):
        part.normal_(generator=generator)
    q, k, v = fused.unbind(2)
    assert (tokens - 1) * q.stride(1) > 2**31
    shape, end = select(q, k, config).pyramid, slice(-tail, None)
    small = type(shape)(tail, shape.num_levels, shape.pooling_factor)
    pooled, bits = ops.pool(q, k, v, shape, scores=True)
    pooled_end, bits_end = ops.pool(*(x[:, end].clone() for x in (q, k, v)), small, scores=True)
    assert bits is not None
    assert bits_end is not None
    for whole, part in zip((*pooled, *bits), (*pooled_end, *bits_end), strict=True):
        dim = 1 if whole.dim() == 4 else 2
        first = 2 if whole.dim() == 4 else 1
        levels = zip(whole.split(shape.sizes[first:], dim), part.split(small.sizes[first:], dim), strict=True)
        for level, level_end in levels:
            assert torch.equal(
                level.narrow(dim, level.shape[dim] - level_end.shape[dim], level_end.shape[dim]), level_end
            )
    del pooled_end, bits_end
    rows = ops.select(*bits, shape, config.strata, config.topk // config.strata, True)
    inverse = reference.invert(rows, shape.offsets[-1])
    sub = ops.gather((q, k, v), pooled, rows, inverse, shape)
    # The last slot of all is the last entry of the coarsest level.
    for x, gathered in zip((q, k, v), sub, strict=True):
        torch.testing.assert_close(gathered[0, -1], x[0, -64:].float().mean(0).bfloat16())
    del fused, q, k, v, pooled

    # Tokens take the rows of their entries, and the last entries the tokens that they reach.
    tail_of = torch.arange(tokens - 1024, tokens, device="cuda")
    expected = {0: torch.zeros(1, 1024, 8, 128, device="cuda"), 1: torch.zeros(1, 1024, 8, 128, device="cuda")}
    for level, offset in enumerate(shape.offsets[:-1]):
        for shift, total in expected.items():
            entry = (tail_of + shift) // 4**level - shift
            taken = reference.take_rows(sub[0], inverse[..., offset + entry]).float()
            total += taken if shift else taken / 4**level
    dq, _, dv = torch.ops.lhcp.gather_backward(*sub, inverse, tokens, shape.num_levels, 4)
    torch.testing.assert_close(dq[:, -1024:], expected[0].bfloat16())
    del dq
    out = ops.scatter_back(sub[0], rows, inverse, shape, 1, None)
    torch.testing.assert_close(out[:, -1024:], expected[1].bfloat16())
    back = torch.ops.lhcp.scatter_back_backward(dv, rows, shape.num_levels, 4, 1)
    # The last entry of the coarsest level reaches the last token alone, the one before it 64 tokens.
    assert torch.equal(back[0, -1], dv[0, -1])
    before = inverse[0, :, -2]
    expected_before = dv[0, -65:-1].float().sum(0)
    for head in range(8):
        torch.testing.assert_close(back[0, before[head], head], expected_before[head].bfloat16())


MEMCHECK = """
import torch
from lhcp.attention import LighthouseConfig, lighthouse_attention
for levels, p, heads, groups, width in ((3, 4, 4, 2, 64), (4, 3, 3, 1, 80), (2, 2, 2, 2, 48)):
    config = LighthouseConfig(num_levels=levels, pooling_factor=p, topk=12, num_strata=2)
    q, k, v = torch.randn(2, 16 * p ** (levels - 1), heads + 2 * groups, width, device="cuda").bfloat16().split(
        (heads, groups, groups), 2)
    q, k, v = (x.requires_grad_() for x in (q.detach(), k.detach(), v.detach()))
    lighthouse_attention(q, k, v, config).square().sum().backward()
torch.cuda.synchronize()
"""


def test_memcheck_is_clean() -> None:
    """compute-sanitizer sees no access outside of allocations, which are not cached in this process."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer")
    command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", MEMCHECK]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in result.stdout
