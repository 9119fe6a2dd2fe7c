"""Attention blocks: outputs, log-sum-exps and gradients against float64 autograd of the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lhcp.config import ConfigError
from lhcp.distributed.exchange.block import block_backend, check_block_backend


def definition(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Softmax attention and its log-sum-exp, written out; K and V repeated over their query heads."""
    group = q.shape[2] // k.shape[2]
    q_, k_, v_ = q.transpose(1, 2), *(x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    scores = q_ @ k_.mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, dtype=q.dtype).triu(1)
    return (scores.softmax(-1) @ v_).transpose(1, 2), scores.logsumexp(-1)


def tensors(queries: int, keys: int, kv_heads: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = [(2, queries, 4, 8), (2, keys, kv_heads, 8), (2, keys, kv_heads, 8), (2, queries, 4, 8)]
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes)


def relative(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().double(), reference.detach()
    return float((value - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", ["math", "cpu", "auto"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(13, 13, True), (7, 13, False), (13, 5, False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_block_is_its_definition(
    name: Any, kv_heads: int, queries: int, keys: int, causal: bool, dtype: torch.dtype
) -> None:
    q, k, v, grad = tensors(queries, keys, kv_heads, dtype)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out_ref, lse_ref = definition(*exact, causal)
    out_ref.backward(grad.double())

    backend = block_backend(name, q)
    out, lse = backend.forward(q, k, v, causal)
    gradients = backend.backward(grad, q, k, v, out, lse, causal)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    assert out.dtype == q.dtype
    assert relative(out, out_ref) <= tolerance
    assert relative(lse, lse_ref) <= tolerance
    for value, reference in zip(gradients, exact, strict=True):
        assert value.shape == reference.shape
        assert relative(value, reference.grad) <= tolerance


@pytest.mark.parametrize("name", ["math", "cpu"])
def test_bfloat16_is_as_exact_as_stock_attention(name: Any) -> None:
    """Error against float64 at most twice that of PyTorch's own bfloat16 attention."""
    q, k, v, grad = tensors(64, 64, 4, torch.bfloat16)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out_ref, _ = definition(*exact, causal=True)
    out_ref.backward(grad.double())
    stock = [x.clone().requires_grad_() for x in (q, k, v)]
    out_stock = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in stock), is_causal=True).transpose(1, 2)
    out_stock.backward(grad)

    backend = block_backend(name, q)
    out, lse = backend.forward(q, k, v, causal=True)
    gradients = backend.backward(grad, q, k, v, out, lse, causal=True)
    assert lse.dtype == torch.float32
    assert relative(out, out_ref) <= 2 * relative(out_stock, out_ref)
    for value, other, reference in zip(gradients, stock, exact, strict=True):
        assert value.dtype == torch.bfloat16
        assert relative(value, reference.grad) <= 2 * relative(other.grad, reference.grad)


@pytest.mark.parametrize("name", ["math", "cpu"])
def test_any_strides_do(name: Any) -> None:
    """Heads and width strided, transposed or expanded, gradient included: kernels that assume otherwise read astray."""
    plain = tensors(12, 12, 4, torch.float64)
    backend = block_backend(name, plain[0])

    def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        out, lse = backend.forward(q, k, v, causal=True)
        return out, lse, *backend.backward(grad, q, k, v, out, lse, causal=True)

    expected = run(*plain)
    doubled = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in plain]
    moved = [x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in plain]
    for strided in (doubled, moved):
        assert all(x.stride(-1) != 1 for x in strided)
        for value, reference in zip(run(*strided), expected, strict=True):
            torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)
    flat = [x[..., :1].expand(-1, -1, -1, 8) for x in plain]
    for value, reference in zip(run(*flat), run(*(x.contiguous() for x in flat)), strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)


def test_backends_that_cannot_take_the_tensors_are_refused() -> None:
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ConfigError, match=r"'flash' takes float16 or bfloat16 on CUDA, not torch\.float32 on cpu"):
        block_backend("flash", q)
    with pytest.raises(ConfigError, match=r"valid are \['auto', 'cpu', 'cudnn', 'flash', 'math'\]"):
        check_block_backend("triton")
