"""`Merge` and `Sum` of float32 in one pass over the rows: each part is read once, the result written once."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lhcp.distributed.exchange.merge import Part

ROWS = 16
"""Rows of a program, all of one head."""


@triton.jit
def _part(x, place, batch, row, head, d, D: tl.constexpr):
    """A part's numbers in a program's rows; zeros where it has none."""
    stride_batch, stride_row, stride_head, first_row, last_row, first_head, last_head = place
    last_row = tl.where((head >= first_head) & (head < last_head), last_row, first_row)
    has = (row >= first_row) & (row < last_row)
    x += batch * stride_batch + (head - first_head) * stride_head
    rows = x + ((row - first_row) * stride_row)[:, None]
    return tl.load(rows + d, mask=has[:, None] & (d < D), other=0.0).to(tl.float32)


@triton.jit
def _lse(lse, lse_place, place, batch, row, head):
    """A block's log-sum-exps in a program's rows; minus infinity where it has none."""
    stride_batch, stride_head, stride_row = lse_place
    first_row, last_row = place[3], place[4]
    at = lse + batch * stride_batch + head * stride_head + (row - first_row) * stride_row
    return tl.load(at, mask=(row >= first_row) & (row < last_row), other=float("-inf"))


@triton.jit
def _merge_kernel(
    out, lse, parts, places, lses, lse_places, n, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % heads).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // heads * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    exists = row < n
    d = tl.arange(0, BLOCK_D)[None, :]

    largest = tl.where(exists, float("-inf"), 0.0)
    for i in tl.static_range(len(parts)):
        largest = tl.maximum(largest, _lse(lses[i], lse_places[i], places[i], batch, row, head))
    scale = tl.where(exists, 0.0, 1.0)
    for i in tl.static_range(len(parts)):
        scale += tl.exp(_lse(lses[i], lse_places[i], places[i], batch, row, head) - largest)
    result = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i in tl.static_range(len(parts)):
        weight = tl.exp(_lse(lses[i], lse_places[i], places[i], batch, row, head) - largest) / scale
        result += _part(parts[i], places[i], batch, row, head, d, D) * weight[:, None]
    tl.store(out + ((batch * n + row) * heads + head)[:, None] * D + d, result, mask=exists[:, None] & (d < D))
    tl.store(lse + (batch * heads + head) * n + row, largest + tl.log(scale), mask=exists)


def merge_in_one_pass(out: Tensor, lse: Tensor, parts: Sequence[Part]) -> None:
    """`Merge` of some parts into `out` and `lse`, both contiguous.

    The first part may be in `out`: what is written comes from what was read there. Not in `lse`, which is read thrice.
    """
    batch, n, heads, width = out.shape
    assert out.is_contiguous()
    assert lse.is_contiguous()
    lses = tuple(part.lse for part in parts if part.lse is not None)
    assert len(lses) == len(parts)
    assert all(x is not lse for x in lses)
    grid = (triton.cdiv(n, ROWS) * heads, batch)
    _merge_kernel[grid](
        out, lse, *_arguments(parts), lses, tuple(x.stride() for x in lses), n, heads,
        D=width, BLOCK_D=triton.next_power_of_2(width), ROWS=ROWS, num_warps=4,
    )  # fmt: skip


@triton.jit
def _add_kernel(
    out, parts, places, n, heads, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    head = (tl.program_id(0) % heads).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // heads * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i in tl.static_range(len(parts)):
        total += _part(parts[i], places[i], batch, row, head, d, D)
    tl.store(out + ((batch * n + row) * heads + head)[:, None] * D + d, total, mask=(row < n)[:, None] & (d < D))


def add_in_one_pass(out: Tensor, parts: Sequence[Part]) -> None:
    """`Sum` of some parts into `out`, which is contiguous; the first part may be in it."""
    batch, n, heads, width = out.shape
    assert out.is_contiguous()
    grid = (triton.cdiv(n, ROWS) * heads, batch)
    _add_kernel[grid](
        out, *_arguments(parts), n, heads, D=width, BLOCK_D=triton.next_power_of_2(width), ROWS=ROWS, num_warps=4
    )


def _arguments(parts: Sequence[Part]) -> tuple[tuple[Tensor, ...], tuple[tuple[int, ...], ...]]:
    """The parts' tensors; and of each its strides, and the rows and heads that it has."""
    assert all(part.x.stride(3) == 1 for part in parts)
    places = [
        (*part.x.stride()[:3], part.rows.start, part.rows.stop, part.heads.start, part.heads.stop) for part in parts
    ]
    return tuple(part.x for part in parts), tuple(places)
