"""Rows between tokens and slots: every slot takes its entry's row, every token sums the rows of its entries.

`gather` and `spread` are each other's transposes, over aligned windows (step 5: means, and their gradients) and over
windows shifted by one token (step 6: rows back to positions, and their gradients). Each output row is written once,
by one program, which sums in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lhcp.kernels.lighthouse.pyramid import PyramidShape
from lhcp.kernels.lighthouse.tile import first_stored, tile

TILE = 2048
"""Elements of a program's tile: measured on an H100, with the warps below, among 1,024 to 8,192 and 1 to 8 warps."""
GATHER_WARPS, SPREAD_WARPS = 4, 2


@triton.jit
def _gather_kernel(
    x, pooled, rows, out,
    stride_batch, stride_token, stride_head,
    tokens, chunk_len, slots, groups, pooled_rows,
    FIRST: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0) % groups).to(tl.int64)
    slot = tl.program_id(0) // groups * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, W)
    head, d = column // BLOCK_D, column % BLOCK_D
    fits = ((head < HEADS) & (d < D))[None, :]
    columns, dense_columns = (head * stride_head + d)[None, :], (head * D + d)[None, :]
    width = groups * HEADS * D
    x += batch * stride_batch + group * HEADS * stride_head
    pooled += batch * pooled_rows * width + group * HEADS * D
    out += batch * slots * width + group * HEADS * D

    # Rows of the pyramid: level 0; level 1, unless it is stored; the stored levels.
    exists = slot < slots
    row = tl.load(rows + (batch * groups + group) * slots + slot, mask=exists, other=0)
    is_token = row < tokens
    begin, end, stored_from = row, row + 1, tokens
    if FIRST == 2:
        stored_from += tokens // P
        window = (row - tokens) * P
        chunk_end = (window // chunk_len + 1) * chunk_len
        window += SHIFT * (P - 1)
        begin = tl.where(is_token, begin, window)
        end = tl.where(is_token, end, tl.minimum(window + P, chunk_end))
    is_stored = row >= stored_from

    at = (row - stored_from).to(tl.int64) * width
    stored = tl.load(pooled + at[:, None] + dense_columns, mask=(exists & is_stored)[:, None] & fits, other=0)
    total = tl.zeros([BLOCK, W], tl.float32)
    for child in tl.static_range(P if FIRST == 2 else 1):
        token = begin + child
        taken = exists & ~is_stored & (token < end)
        at = token.to(tl.int64) * stride_token
        total += tl.load(x + at[:, None] + columns, mask=taken[:, None] & fits, other=0).to(tl.float32)
    if FIRST == 2 and not SHIFT:
        total *= tl.where(is_token, 1.0, 1.0 / P)[:, None]
    total += stored.to(tl.float32)
    tl.store(out + slot.to(tl.int64)[:, None] * width + dense_columns, total, mask=exists[:, None] & fits)


@triton.jit
def _spread_kernel(
    sub, inverse, halo, out,
    stride_batch, stride_slot, stride_head,
    tokens, chunk_len, groups, entries,
    L: tl.constexpr, P: tl.constexpr, SHIFT: tl.constexpr, HALO: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0) % groups).to(tl.int64)
    token = tl.program_id(0) // groups * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, W)
    head, d = column // BLOCK_D, column % BLOCK_D
    fits = ((head < HEADS) & (d < D))[None, :]
    columns, dense_columns = (head * stride_head + d)[None, :], (head * D + d)[None, :]
    width = groups * HEADS * D
    sub += batch * stride_batch + group * HEADS * stride_head
    out += batch * tokens * width + group * HEADS * D
    halo += batch * width + group * HEADS * D
    inverse += (batch * groups + group) * entries

    exists = token < tokens
    chunk = token // chunk_len
    inside = token - chunk * chunk_len
    total = tl.zeros([BLOCK, W], tl.float32)
    offset = 0
    for level in tl.static_range(L):
        entry = (inside + SHIFT) // P**level - SHIFT
        at = offset + chunk * (chunk_len // P**level) + entry
        slot = tl.load(inverse + at, mask=exists & (entry >= 0), other=-1).to(tl.int64)
        row = tl.load(sub + slot[:, None] * stride_slot + columns, mask=(slot >= 0)[:, None] & fits, other=0)
        total += row.to(tl.float32) * (1.0 if SHIFT else 1.0 / P**level)
        offset += tokens // P**level
    # Few programs hold some of a chunk's first tokens, which lack entries of the coarsest levels.
    start = tl.program_id(0) // groups * BLOCK % chunk_len
    if HALO and (start + 1 < P ** (L - 1) or start + BLOCK > chunk_len):
        for level in tl.static_range(1, L):
            before = (chunk * (L - 1) + level - 1).to(tl.int64) * tl.num_programs(1) * width
            lacks = exists & (inside + 1 < P**level)
            total += tl.load(halo + before[:, None] + dense_columns, mask=lacks[:, None] & fits, other=0)
    tl.store(out + token.to(tl.int64)[:, None] * width + dense_columns, total, mask=exists[:, None] & fits)


def gather(
    x_BNHD: Tensor, pooled_BRHD: Tensor, rows_BGS: Tensor, shape: PyramidShape, *, shifted_in: int = 0
) -> Tensor:
    """The pyramid's rows at `rows_BGS`.

    Args:
        x_BNHD: level 0; any strides, the last 1.
        pooled_BRHD: its stored levels (see `pool`), contiguous.
        rows_BGS: int32 rows of the pyramid, contiguous.
        shape: the pyramid over N tokens.
        shifted_in: as `pooled_BRHD` was made.

    Returns:
        [B, S, H, D] in x's dtype, contiguous.
    """
    batch, tokens, heads, width = x_BNHD.shape
    groups, slots = rows_BGS.shape[1:]
    out = x_BNHD.new_empty(batch, slots, heads, width)
    block, constants = tile(TILE, width, heads // groups)
    _gather_kernel[(triton.cdiv(slots, block) * groups, batch)](
        x_BNHD, pooled_BRHD, rows_BGS, out,
        x_BNHD.stride(0), x_BNHD.stride(1), x_BNHD.stride(2),
        tokens, tokens // max(1, shifted_in), slots, groups, pooled_BRHD.shape[1],
        FIRST=first_stored(shape.num_levels), P=shape.pooling_factor, SHIFT=bool(shifted_in),
        BLOCK=block, **constants, num_warps=GATHER_WARPS,
    )  # fmt: skip
    return out


def spread(
    sub_BSHD: Tensor,
    inverse_BGP: Tensor,
    shape: PyramidShape,
    *,
    shifted_in: int = 0,
    halo_CLBHD: Tensor | None = None,
) -> Tensor:
    """For each token, the sum of the rows of its entries: the transpose of `gather`.

    Args:
        sub_BSHD: rows by slot; any strides, the last 1.
        inverse_BGP: the slot of each of the pyramid's rows, or -1; int32, contiguous.
        shape: the pyramid over N tokens.
        shifted_in: 0: a token's entries are those whose window it is in, each weighted by 1 / p^l. Else the number
            of chunks, in each of which windows are shifted by one token and weights are 1.
        halo_CLBHD: with shifted windows, the rows of the entries before each chunk's first of level 1, 2, ...;
            float32, contiguous. None: there are none.

    Returns:
        [B, N, H, D] in the rows' dtype, contiguous; sums in float32, finest level first.
    """
    assert shifted_in or halo_CLBHD is None
    batch, _, heads, width = sub_BSHD.shape
    groups, entries = inverse_BGP.shape[1:]
    tokens = shape.length
    out = sub_BSHD.new_empty(batch, tokens, heads, width)
    block, constants = tile(TILE, width, heads // groups)
    _spread_kernel[(triton.cdiv(tokens, block) * groups, batch)](
        sub_BSHD, inverse_BGP, sub_BSHD if halo_CLBHD is None else halo_CLBHD, out,
        sub_BSHD.stride(0), sub_BSHD.stride(1), sub_BSHD.stride(2),
        tokens, tokens // max(1, shifted_in), groups, entries,
        L=shape.num_levels, P=shape.pooling_factor, SHIFT=bool(shifted_in), HALO=halo_CLBHD is not None,
        BLOCK=block, **constants, num_warps=SPREAD_WARPS,
    )  # fmt: skip
    return out
