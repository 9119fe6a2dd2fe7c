"""Pool and score in one pass: every row is read once, in place, and leaves in its windows' sums and maxima.

A program walks E coarsest windows of one KV head's rows, token by token, with one running sum per level. The
windows lie side by side in a tile [E, W], W being the width of the KV head's rows (all its query heads, or one
key), so no sum crosses a thread, and a window's rows are summed in the order of its tokens.

Windows may be shifted by one token: window w of level l then covers tokens w p^l - 1 .. (w+1) p^l - 2 of a chunk
and belongs to entry w - 1. Those are the positions that an entry is scattered back to, so their sum is its gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lhcp.kernels.lighthouse.pyramid import PyramidShape
from lhcp.kernels.lighthouse.tile import first_stored, tile

TILE = 2048
"""Elements of a program's tile: 16 for each of 128 threads, two loads of 16 bytes in half precision."""
WARPS = 4


@triton.jit
def _window(
    x, pooled, bits, window, columns, pooled_columns, fits, chunk, chunk_len, tokens, stride_token, pooled_stride,
    LEVEL: tl.constexpr, FIRST: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, SCORE: tl.constexpr,
    E: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Sum [E, W] and, as bits, the largest squared norm [E] of windows of LEVEL; stores those of levels >= 1."""
    total = tl.zeros([E, W], tl.float32)
    top = tl.zeros([E], tl.int32)
    if LEVEL == 0:
        token = window - SHIFT
        inside = (token >= 0) & (token < chunk_len)
        at = (chunk * chunk_len + token).to(tl.int64) * stride_token
        row = tl.load(x + at[:, None] + columns[None, :], mask=inside[:, None] & fits[None, :], other=0)
        total = row.to(tl.float32)
        if SCORE:
            # Sums of squares are >= 0, so their patterns order as they do; without its sign a NaN is above all.
            top = tl.sum(total * total, 1).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        UNROLL: tl.constexpr = P if LEVEL == 1 and P <= 8 else 1
        for child in tl.range(P, loop_unroll_factor=UNROLL):
            row, norm = _window(
                x, pooled, bits, window * P + child, columns, pooled_columns, fits, chunk, chunk_len, tokens,
                stride_token, pooled_stride, LEVEL - 1, FIRST, P, SHIFT, SCORE, E, W,
            )  # fmt: skip
            total += row
            top = tl.maximum(top, norm)

        SIZE: tl.constexpr = P**LEVEL
        per_chunk = chunk_len // SIZE
        entry = window - SHIFT
        exists = (entry >= 0) & (entry < per_chunk)
        entry += chunk * per_chunk
        if SCORE:
            offset = 0
            for finer in tl.static_range(1, LEVEL):
                offset += tokens // P**finer
            norm = tl.sqrt_rn(top.to(tl.float32, bitcast=True)).to(tl.int32, bitcast=True) & 0x7FFFFFFF
            tl.store(bits + offset + entry, norm, mask=exists)
        if LEVEL >= FIRST:
            offset = 0
            for finer in tl.static_range(FIRST, LEVEL):
                offset += tokens // P**finer
            mean = total if SHIFT else total * (1.0 / SIZE)
            at = (offset + entry).to(tl.int64) * pooled_stride
            tl.store(pooled + at[:, None] + pooled_columns[None, :], mean, mask=exists[:, None] & fits[None, :])
    return total, top


@triton.jit
def _pool_kernel(
    x, pooled, bits,
    stride_batch, stride_token, stride_head,
    tokens, chunks, groups, pooled_rows, scored,
    L: tl.constexpr, FIRST: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, SCORE: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, W: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    # Heads lie side by side in memory, so their programs are neighbours.
    group = (tl.program_id(0) % groups).to(tl.int64)
    block = tl.program_id(0) // groups
    chunk = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    column = tl.arange(0, W)
    head, d = column // BLOCK_D, column % BLOCK_D
    fits = (head < HEADS) & (d < D)
    width = groups * HEADS * D
    _window(
        x + batch * stride_batch + group * HEADS * stride_head,
        pooled + batch * pooled_rows * width + group * HEADS * D,
        bits + (batch * groups + group) * scored,
        block * E + tl.arange(0, E), head * stride_head + d, head * D + d, fits,
        chunk, tokens // chunks, tokens, stride_token, width,
        L - 1, FIRST, P, SHIFT, SCORE, E, W,
    )  # fmt: skip


def pool(
    x_BNHD: Tensor,
    num_kv_heads: int,
    shape: PyramidShape,
    *,
    scores: bool = False,
    shifted_in: int = 0,
) -> tuple[Tensor, Tensor]:
    """Pooled rows, and scores, of the windows of every level >= 1.

    Args:
        x_BNHD: any strides, the last 1.
        num_kv_heads: G; the rows of H / G neighbouring heads are scored as one.
        shape: the pyramid over N tokens.
        scores: whether to score, too.
        shifted_in: 0: aligned windows, whose rows are means. Else the number of chunks, in each of which windows
            are shifted by one token and rows are sums.

    Returns:
        Pooled rows of the levels from `first_stored` on, [B, rows, H, D] in x's dtype, and bits of the largest
        norm in each window of levels >= 1, int32 [B, G, entries], empty where not asked for.
    """
    batch, tokens, heads, width = x_BNHD.shape
    levels, chunks, first = shape.num_levels, max(1, shifted_in), first_stored(shape.num_levels)
    stored = sum(shape.sizes[first:])
    scored = sum(shape.sizes[1:]) if scores else 0
    pooled = x_BNHD.new_empty(batch, stored, heads, width)
    bits = x_BNHD.new_empty(batch, num_kv_heads, scored, dtype=torch.int32)
    windows = shape.sizes[-1] // chunks + bool(shifted_in)
    per_program, constants = tile(TILE, width, heads // num_kv_heads)
    grid = (triton.cdiv(windows, per_program) * num_kv_heads, chunks, batch)
    _pool_kernel[grid](
        x_BNHD, pooled, bits,
        x_BNHD.stride(0), x_BNHD.stride(1), x_BNHD.stride(2),
        tokens, chunks, num_kv_heads, stored, scored,
        L=levels, FIRST=first, P=shape.pooling_factor, SHIFT=bool(shifted_in), SCORE=scores,
        E=per_program, **constants, num_warps=WARPS,
    )  # fmt: skip
    return pooled, bits
