"""The Triton kernels as torch ops `lhcp::*`, and on them the functions of `reference`, name by name.

They are opaque to torch.compile, which needs no graph break for them, and carry their own gradients. float16,
bfloat16 and float32; sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from lhcp.kernels.lighthouse import gather as gather_kernels
from lhcp.kernels.lighthouse import pool as pool_kernels
from lhcp.kernels.lighthouse import select as select_kernels
from lhcp.kernels.lighthouse.pyramid import PyramidShape
from lhcp.kernels.lighthouse.reference import Bits, Triple
from lhcp.kernels.lighthouse.tile import first_stored

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _op(name: str) -> Callable[[_Function], _Function]:
    """Register what is decorated as `lhcp::name`, on every device.

    Not by `torch.library.custom_op`, whose wrapper takes 0.2 ms a call (torch 2.11): five times that in a layer.
    """

    def register(function: _Function) -> _Function:
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(f"lhcp::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"lhcp::{name}", "default")(function)
        return function

    return register


def _fake(name: str) -> Callable[[_Function], _Function]:
    """Register what is decorated as the shapes of `lhcp::name`."""

    def register(function: _Function) -> _Function:
        torch.library.register_fake(f"lhcp::{name}", function)
        return function

    return register


def _readable(x: Tensor) -> Tensor:
    """`x` with contiguous rows, its heads within offsets of 32 bits of each other: all that kernels ask of strides."""
    return x if x.stride(-1) == 1 and x.shape[2] * x.stride(2) < 2**31 else x.contiguous()


def _aligned(x: Tensor) -> Tensor:
    """`x` where a row begins at a multiple of 16 elements, zeros behind shorter rows.

    The alignment decides which thread loads what, and so in which order a row is summed: equal rows must have
    equal scores, whatever tensor they are in.
    """
    x = _readable(x)
    if x.shape[-1] % 16:
        return torch.nn.functional.pad(x, (0, -x.shape[-1] % 16)).contiguous()
    if any(stride % 16 for stride in x.stride()[:-1]) or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _pool_and_score(x: Tensor, num_kv_heads: int, shape: PyramidShape) -> tuple[Tensor, Tensor]:
    aligned = _aligned(x)
    pooled, bits = pool_kernels.pool(aligned, num_kv_heads, shape, scores=True)
    return pooled if aligned.shape == x.shape else _pool_rows(x, num_kv_heads, shape), bits


def _pool_rows(x: Tensor, num_kv_heads: int, shape: PyramidShape) -> Tensor:
    return pool_kernels.pool(_readable(x), num_kv_heads, shape)[0]


def _empty_bits(x: Tensor, num_kv_heads: int, entries: int) -> Tensor:
    return x.new_empty(x.shape[0], num_kv_heads, entries, dtype=torch.int32)


# --- pool and score ---


@_op("pool")
def _pool(
    q: Tensor, k: Tensor, v: Tensor, num_levels: int, pooling_factor: int, scores: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, groups = PyramidShape(q.shape[1], num_levels, pooling_factor), k.shape[2]
    pooled_v = _pool_rows(v, groups, shape)
    if not scores:
        bits = _empty_bits(q, groups, 0)
        return _pool_rows(q, groups, shape), _pool_rows(k, groups, shape), pooled_v, bits, bits.clone()
    pooled_q, query_bits = _pool_and_score(q, groups, shape)
    pooled_k, key_bits = _pool_and_score(k, groups, shape)
    return pooled_q, pooled_k, pooled_v, query_bits, key_bits


@_fake("pool")
def _(
    q: Tensor, k: Tensor, v: Tensor, num_levels: int, pooling_factor: int, scores: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sizes, groups = PyramidShape(q.shape[1], num_levels, pooling_factor).sizes, k.shape[2]
    stored = sum(sizes[first_stored(num_levels) :])
    scored = sum(sizes[1:]) if scores else 0
    pooled = (x.new_empty(x.shape[0], stored, *x.shape[2:]) for x in (q, k, v))
    return *pooled, _empty_bits(q, groups, scored), _empty_bits(k, groups, scored)  # type: ignore[return-value]


@_op("score")
def _score(x: Tensor, num_kv_heads: int, num_levels: int, pooling_factor: int) -> Tensor:
    shape = PyramidShape(x.shape[1], num_levels, pooling_factor)
    # Rows are pooled, too: another kernel might sum in another order, and this must be what `pool` returns.
    return pool_kernels.pool(_aligned(x), num_kv_heads, shape, scores=True)[1]


@_fake("score")
def _(x: Tensor, num_kv_heads: int, num_levels: int, pooling_factor: int) -> Tensor:
    return _empty_bits(x, num_kv_heads, sum(PyramidShape(x.shape[1], num_levels, pooling_factor).sizes[1:]))


def pool(q: Tensor, k: Tensor, v: Tensor, shape: PyramidShape, *, scores: bool) -> tuple[Triple, Bits | None]:
    """See `reference.pool`: the levels that `gather` does not pool itself. Carries no gradient."""
    pooled_q, pooled_k, pooled_v, query_bits, key_bits = torch.ops.lhcp.pool(
        q.detach(), k.detach(), v.detach(), shape.num_levels, shape.pooling_factor, scores
    )
    return (pooled_q, pooled_k, pooled_v), (query_bits, key_bits) if scores else None


def score(x_BNHD: Tensor, num_kv_heads: int, shape: PyramidShape) -> Tensor:
    """See `reference.score`."""
    out: Tensor = torch.ops.lhcp.score(x_BNHD.detach(), num_kv_heads, shape.num_levels, shape.pooling_factor)
    return out


# --- select ---


def select(
    query_bits_BGE: Tensor, key_bits_BGE: Tensor, shape: PyramidShape, strata: int, budget: int, cover: bool
) -> Tensor:
    """See `reference.select`; an op by `select_op`."""
    return select_kernels.select(query_bits_BGE.contiguous(), key_bits_BGE.contiguous(), shape, strata, budget, cover)


# --- gather ---


@_op("gather")
def _gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_q: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    rows: Tensor,
    inverse: Tensor,
    num_levels: int,
    pooling_factor: int,
) -> tuple[Tensor, Tensor, Tensor]:
    shape, rows = PyramidShape(q.shape[1], num_levels, pooling_factor), rows.contiguous()
    pairs = ((q, pooled_q), (k, pooled_k), (v, pooled_v))
    q_sub, k_sub, v_sub = (gather_kernels.gather(_readable(x), pooled, rows, shape) for x, pooled in pairs)
    return q_sub, k_sub, v_sub


@_fake("gather")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pooled_q: Tensor,
    pooled_k: Tensor,
    pooled_v: Tensor,
    rows: Tensor,
    inverse: Tensor,
    num_levels: int,
    pooling_factor: int,
) -> tuple[Tensor, Tensor, Tensor]:
    q_sub, k_sub, v_sub = (x.new_empty(x.shape[0], rows.shape[-1], *x.shape[2:]) for x in (q, k, v))
    return q_sub, k_sub, v_sub


@_op("gather_backward")
def _gather_backward(
    q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, inverse: Tensor, tokens: int, num_levels: int, pooling_factor: int
) -> tuple[Tensor, Tensor, Tensor]:
    shape, inverse = PyramidShape(tokens, num_levels, pooling_factor), inverse.contiguous()
    dq, dk, dv = (gather_kernels.spread(_readable(x), inverse, shape) for x in (q_grad, k_grad, v_grad))
    return dq, dk, dv


@_fake("gather_backward")
def _(
    q_grad: Tensor, k_grad: Tensor, v_grad: Tensor, inverse: Tensor, tokens: int, num_levels: int, pooling_factor: int
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape[0], tokens, *x.shape[2:]) for x in (q_grad, k_grad, v_grad))
    return dq, dk, dv


def _save_for_gather(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, *_, inverse, num_levels, pooling_factor = inputs
    ctx.save_for_backward(inverse)
    ctx.shape = (q.shape[1], num_levels, pooling_factor)


def _gather_grads(ctx: Any, q_grad: Tensor, k_grad: Tensor, v_grad: Tensor) -> tuple[Tensor | None, ...]:
    (inverse,) = ctx.saved_tensors
    dq, dk, dv = torch.ops.lhcp.gather_backward(q_grad, k_grad, v_grad, inverse, *ctx.shape)
    return dq, dk, dv, None, None, None, None, None, None, None


torch.library.register_autograd("lhcp::gather", _gather_grads, setup_context=_save_for_gather)


def gather(qkv: Triple, pooled: Triple, rows_BGS: Tensor, inverse_BGP: Tensor, shape: PyramidShape) -> Triple:
    """See `reference.gather`."""
    out: Triple = torch.ops.lhcp.gather(*qkv, *pooled, rows_BGS, inverse_BGP, shape.num_levels, shape.pooling_factor)
    return out


# --- scatter back ---


@_op("scatter_back")
def _scatter_back(
    sub: Tensor,
    rows: Tensor,
    inverse: Tensor,
    halo: Tensor | None,
    tokens: int,
    num_levels: int,
    pooling_factor: int,
    num_chunks: int,
) -> Tensor:
    shape = PyramidShape(tokens, num_levels, pooling_factor)
    halo = None if halo is None else halo.contiguous()
    return gather_kernels.spread(_readable(sub), inverse.contiguous(), shape, shifted_in=num_chunks, halo_CLBHD=halo)


@_fake("scatter_back")
def _(
    sub: Tensor,
    rows: Tensor,
    inverse: Tensor,
    halo: Tensor | None,
    tokens: int,
    num_levels: int,
    pooling_factor: int,
    num_chunks: int,
) -> Tensor:
    return sub.new_empty(sub.shape[0], tokens, *sub.shape[2:])


@_op("scatter_back_backward")
def _scatter_back_backward(grad: Tensor, rows: Tensor, num_levels: int, pooling_factor: int, num_chunks: int) -> Tensor:
    shape = PyramidShape(grad.shape[1], num_levels, pooling_factor)
    grad, rows = _readable(grad), rows.contiguous()
    pooled, _ = pool_kernels.pool(grad, rows.shape[1], shape, shifted_in=num_chunks)
    return gather_kernels.gather(grad, pooled, rows, shape, shifted_in=num_chunks)


@_fake("scatter_back_backward")
def _(grad: Tensor, rows: Tensor, num_levels: int, pooling_factor: int, num_chunks: int) -> Tensor:
    return grad.new_empty(grad.shape[0], rows.shape[-1], *grad.shape[2:])


def _save_for_scatter_back(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, rows, _, halo, _, *ctx.shape = inputs
    ctx.save_for_backward(rows)
    ctx.has_halo = halo is not None


def _scatter_back_grads(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (rows,) = ctx.saved_tensors
    sub_grad = torch.ops.lhcp.scatter_back_backward(grad, rows, *ctx.shape)
    halo_grad = _halo_grad(grad, *ctx.shape) if ctx.has_halo else None
    return sub_grad, None, None, halo_grad, None, None, None, None


def _halo_grad(grad_BNHD: Tensor, num_levels: int, pooling_factor: int, num_chunks: int) -> Tensor:
    """Each halo row's positions are a chunk's first p^l - 1."""
    chunks_BCnHD = grad_BNHD.unflatten(1, (num_chunks, -1))
    levels = [
        chunks_BCnHD[:, :, : pooling_factor**level - 1].sum(2, dtype=torch.float32) for level in range(1, num_levels)
    ]
    return torch.stack(levels).permute(2, 0, 1, 3, 4)


torch.library.register_autograd("lhcp::scatter_back", _scatter_back_grads, setup_context=_save_for_scatter_back)


def scatter_back(
    sub_BSHD: Tensor,
    rows_BGS: Tensor,
    inverse_BGP: Tensor,
    shape: PyramidShape,
    num_chunks: int,
    halo_CLBHD: Tensor | None,
) -> Tensor:
    """See `reference.scatter_back`."""
    out: Tensor = torch.ops.lhcp.scatter_back(
        sub_BSHD, rows_BGS, inverse_BGP, halo_CLBHD, shape.length, shape.num_levels, shape.pooling_factor, num_chunks
    )
    return out
