"""`merge` and `add` in one pass over the rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 16
"""Query rows of a program, all of one head."""


@triton.jit
def _merge_kernel(
    out, lse, new, new_lse, n, heads,
    out_batch, out_row, out_head, lse_batch, lse_head, lse_row,
    new_batch, new_row, new_head, new_lse_batch, new_lse_head, new_lse_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % heads).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // heads * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    exists = row < n
    fits = exists[:, None] & (d < D)
    lse += batch * lse_batch + head * lse_head + row * lse_row
    new_lse += batch * new_lse_batch + head * new_lse_head + row * new_lse_row
    out += (batch * out_batch + head * out_head + row * out_row)[:, None] + d
    new += (batch * new_batch + head * new_head + row * new_row)[:, None] + d

    before, other = tl.load(lse, mask=exists, other=0.0), tl.load(new_lse, mask=exists, other=0.0)
    largest = tl.maximum(before, other)
    total = largest + tl.log(tl.exp(before - largest) + tl.exp(other - largest))
    old = tl.load(out, mask=fits, other=0.0) * tl.exp(before - total)[:, None]
    added = tl.load(new, mask=fits, other=0.0).to(tl.float32) * tl.exp(other - total)[:, None]
    tl.store(out, old + added, mask=fits)
    tl.store(lse, total, mask=exists)


def merge_in_one_pass(out: Tensor, lse: Tensor, new: Tensor, new_lse: Tensor) -> None:
    """`merge` of float32 by a kernel: `out` is read and written once. D must be contiguous."""
    batch, n, heads, width = out.shape
    assert out.stride(3) == new.stride(3) == 1
    grid = (triton.cdiv(n, ROWS) * heads, batch)
    _merge_kernel[grid](
        out, lse, new, new_lse, n, heads,
        *out.stride()[:3], *lse.stride(), *new.stride()[:3], *new_lse.stride(),
        D=width, BLOCK_D=triton.next_power_of_2(width), ROWS=ROWS, num_warps=4,
    )  # fmt: skip


@triton.jit
def _add_kernel(
    out, x, y, n, heads,
    out_batch, out_row, out_head, x_batch, x_row, x_head, y_batch, y_row, y_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) % heads).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0) // heads * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    fits = (row < n) & (d < D)
    first = tl.load(x + batch * x_batch + head * x_head + row * x_row + d, mask=fits).to(tl.float32)
    second = tl.load(y + batch * y_batch + head * y_head + row * y_row + d, mask=fits).to(tl.float32)
    tl.store(out + batch * out_batch + head * out_head + row * out_row + d, first + second, mask=fits)


def add_in_one_pass(out: Tensor, x: Tensor, y: Tensor) -> None:
    """`add` in float32 by a kernel; PyTorch's own, of two dtypes, does not reach the memory's bandwidth."""
    batch, n, heads, width = out.shape
    assert out.shape == x.shape == y.shape
    assert out.stride(3) == x.stride(3) == y.stride(3) == 1
    grid = (triton.cdiv(n, ROWS) * heads, batch)
    _add_kernel[grid](
        out, x, y, n, heads, *out.stride()[:3], *x.stride()[:3], *y.stride()[:3],
        D=width, BLOCK_D=triton.next_power_of_2(width), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
