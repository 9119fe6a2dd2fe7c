"""Specification of the Lighthouse kernels in plain PyTorch: any device, any float dtype, differentiable.

It is also the CPU path, and that of float64. Rows are summed in the accumulation dtype: float64 for float64, else
float32. Nothing here communicates: a chunk's last rows leave through `last_rows` and come in through `halo_CLBHD`.

Shape suffixes: B batch, N tokens held here, H query heads, G KV heads, D head width, L levels, p pooling
factor, P pyramid rows (sum over levels of N/p^l), E pyramid rows of levels >= 1, S gathered rows, T strata, C chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lhcp.kernels.lighthouse.pyramid import PyramidShape

Bits = tuple[Tensor, Tensor]
"""Of query and key scores."""
Triple = tuple[Tensor, Tensor, Tensor]
"""Of queries, keys and values."""


def pyramid_rows(x_BNHD: Tensor, shape: PyramidShape) -> Tensor:
    """All pyramid levels, concatenated: means of p^l consecutive rows.

    Accumulated in the accumulation dtype and rounded once. Level 0 goes through the same cast, so that the
    gradients of a token's rows at the different levels are summed before they are rounded.

    Returns:
        [B, P, H, D] in x's dtype: level 0 (x itself), then level 1, ...
    """
    level = x_BNHD.to(torch.promote_types(x_BNHD.dtype, torch.float32))
    levels = [level]
    for _ in range(shape.num_levels - 1):
        level = level.unflatten(1, (-1, shape.pooling_factor)).mean(2)
        levels.append(level)
    return torch.cat([level.to(x_BNHD.dtype) for level in levels], dim=1)


def row_norms(x_BNHD: Tensor, num_kv_heads: int) -> Tensor:
    """L2 norm, per KV head, of the stacked rows of its heads.

    Returns:
        [B, G, N] in the accumulation dtype.
    """
    # Contiguous: how a row is summed must not depend on its strides, or equal rows would not tie.
    x_BNHD = x_BNHD.to(torch.promote_types(x_BNHD.dtype, torch.float32)).contiguous()
    x_BNGX: Tensor = x_BNHD.unflatten(2, (num_kv_heads, -1)).flatten(3)
    return x_BNGX.square().sum(-1).sqrt().transpose(1, 2)


def score_bits(scores_BGN: Tensor, shape: PyramidShape) -> Tensor:
    """Scores of the levels >= 1, maxima over children, as integers that order the same way.

    These are the bit patterns of non-negative floats, without the sign: it makes -0.0 the largest integer but
    one. A NaN lies above inf.

    Args:
        scores_BGN: of level 0.
        shape: the pyramid.

    Returns:
        [B, G, E], int32 (int64 for float64): level 1, then level 2, ...
    """
    bits = torch.int64 if scores_BGN.dtype == torch.float64 else torch.int32
    level = scores_BGN.view(bits) & torch.iinfo(bits).max
    levels = []
    for _ in range(shape.num_levels - 1):
        level = level.unflatten(-1, (-1, shape.pooling_factor)).amax(-1)
        levels.append(level)
    return torch.cat(levels, -1)


def score(x_BNHD: Tensor, num_kv_heads: int, shape: PyramidShape) -> Tensor:
    """`score_bits` of the rows' norms."""
    return score_bits(row_norms(x_BNHD, num_kv_heads), shape)


def pool(q: Tensor, k: Tensor, v: Tensor, shape: PyramidShape, *, scores: bool) -> tuple[Triple, Bits | None]:
    """What `gather` takes rows from, here the whole pyramids; and, where asked for, the scores of q and k."""
    pooled = (pyramid_rows(q, shape), pyramid_rows(k, shape), pyramid_rows(v, shape))
    groups = k.shape[2]
    return pooled, (score(q.detach(), groups, shape), score(k.detach(), groups, shape)) if scores else None


def _top(keys: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest along the last dimension; equal keys: lower index first."""
    return keys.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def select(
    query_bits_BGE: Tensor, key_bits_BGE: Tensor, shape: PyramidShape, strata: int, budget: int, cover: bool
) -> Tensor:
    """The top-down cascade in each stratum: which entries are gathered, in order of (end, level).

    From the coarsest level down, of a level's candidates the budget // 2 with the highest query scores are
    selected, then of the rest the highest key scores; the children of the selected are the next candidates.
    Every candidate is gathered.

    Args:
        query_bits_BGE: `score_bits` of the query scores.
        key_bits_BGE: likewise, of the key scores.
        shape: the pyramid.
        strata: T, in `shape.length` tokens.
        budget: m, entries selected per level in one stratum.
        cover: whether entry 0 of every level is selected in any case.

    Returns:
        Rows of the pyramid, int32 [B, G, S].
    """
    p, device = shape.pooling_factor, query_bits_BGE.device
    highest, lowest = torch.iinfo(query_bits_BGE.dtype).max, torch.iinfo(query_bits_BGE.dtype).min
    query, key = (
        [level.unflatten(-1, (strata, -1)).clone() for level in bits.split(shape.sizes[1:], -1)]
        for bits in (query_bits_BGE, key_bits_BGE)
    )
    if cover:
        for level in query:
            level[..., 0, 0] = highest
    child = torch.arange(p, device=device)
    candidates = torch.arange(query[-1].shape[-1], device=device).expand(query[-1].shape)
    levels, indices = [], []
    for level in range(shape.num_levels - 1, 0, -1):
        levels.append(torch.full_like(candidates, level))
        indices.append(candidates)
        by_query = _top(query[level - 1].gather(-1, candidates), budget // 2)
        by_key = key[level - 1].gather(-1, candidates).scatter_(-1, by_query, lowest)
        by_key = _top(by_key, budget - budget // 2)
        selected = candidates.gather(-1, torch.cat([by_query, by_key], -1).sort(-1).values)
        candidates = (selected.unsqueeze(-1) * p + child).flatten(-2)
    levels.append(torch.zeros_like(candidates))
    indices.append(candidates)

    level_BGTS, index_BGTS = torch.cat(levels, -1), torch.cat(indices, -1)
    end = (index_BGTS + 1) * p**level_BGTS - 1
    order = (end * shape.num_levels + level_BGTS).argsort(-1)
    level_BGTS, index_BGTS = level_BGTS.gather(-1, order), index_BGTS.gather(-1, order)
    stratum_T1 = torch.arange(strata, device=device).unsqueeze(-1)
    index_BGTS = index_BGTS + stratum_T1 * (shape.length // strata // p**level_BGTS)
    return shape.flatten(level_BGTS, index_BGTS).flatten(2).to(torch.int32)


def invert(index_BGQ: Tensor, size: int) -> Tensor:
    """Where each of 0 .. size - 1 stands in an index that has no number twice, or -1: [B, G, size]."""
    place = torch.arange(index_BGQ.shape[-1], dtype=index_BGQ.dtype, device=index_BGQ.device).expand_as(index_BGQ)
    nowhere = index_BGQ.new_full((*index_BGQ.shape[:2], size), -1)
    return nowhere.scatter_(-1, index_BGQ.long(), place)


def take_rows(rows_BRHD: Tensor, index_BGQ: Tensor) -> Tensor:
    """Row `index[b, g, q]` of each head of KV head g; a zero row where the index is -1.

    Returns:
        [B, Q, H, D].
    """
    heads, width = rows_BRHD.shape[2:]
    index_BHQ = index_BGQ.long().repeat_interleave(heads // index_BGQ.shape[1], dim=1)
    index_BQH1 = index_BHQ.transpose(1, 2).unsqueeze(-1)
    taken = rows_BRHD.gather(1, index_BQH1.clamp(min=0).expand(-1, -1, -1, width))
    return taken.masked_fill_(index_BQH1 < 0, 0)


class _Take(torch.autograd.Function):
    """`take_rows` whose backward takes rows too, through the inverse index: no atomics, no summation order."""

    @staticmethod
    def forward(ctx: Any, rows_BRHD: Tensor, index_BGQ: Tensor, inverse_BGR: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_BGR)
        return take_rows(rows_BRHD, index_BGQ)

    @staticmethod
    def backward(ctx: Any, grad_BQHD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_BGR,) = ctx.saved_tensors
        return take_rows(grad_BQHD, inverse_BGR), None, None


def take(rows_BRHD: Tensor, index_BGQ: Tensor, inverse_BGR: Tensor) -> Tensor:
    """Differentiable `take_rows`. `index` and `inverse` are partial inverses of each other, -1 where undefined."""
    out: Tensor = _Take.apply(rows_BRHD, index_BGQ, inverse_BGR)  # type: ignore[no-untyped-call]
    return out


def gather(qkv: Triple, pooled: Triple, rows_BGS: Tensor, inverse_BGP: Tensor, shape: PyramidShape) -> Triple:
    """The sub-sequence: the pyramids' rows at `rows`, [B, S, H or G, D]. Differentiable in qkv."""
    del qkv, shape
    q, k, v = (take(pyramid, rows_BGS, inverse_BGP) for pyramid in pooled)
    return q, k, v


def last_rows(sub_BSHD: Tensor, inverse_BGP: Tensor, shape: PyramidShape, num_chunks: int) -> Tensor:
    """The rows of the last entry of every level >= 1 in each chunk: what a chunk writes into the next one.

    Returns:
        [C, L - 1, B, H, D] in the accumulation dtype, zero where an entry was not gathered. Differentiable.
    """
    levels = inverse_BGP.split(shape.sizes, -1)[1:]
    ends_BGCL = torch.stack([level.unflatten(-1, (num_chunks, -1))[..., -1] for level in levels], -1)
    # In backward, rows that were not gathered add zeros to a row of another's: no sum, whatever the order.
    rows_BCLHD: Tensor = take_rows(sub_BSHD, ends_BGCL.flatten(2)).unflatten(1, (num_chunks, -1))
    return rows_BCLHD.movedim(0, 2).to(torch.promote_types(sub_BSHD.dtype, torch.float32)).contiguous()


def scatter_back(
    sub_BSHD: Tensor,
    rows_BGS: Tensor,
    inverse_BGP: Tensor,
    shape: PyramidShape,
    num_chunks: int,
    halo_CLBHD: Tensor | None,
) -> Tensor:
    """Add the row of entry (l, i) to positions (i+1) p^l - 1 .. (i+2) p^l - 2, as a gather. Differentiable.

    Position t receives row (t+1) // p^l - 1 of each level, so a level's rows, each repeated p^l times behind
    the previous chunk's last row, only have to be shifted by one.

    Args:
        sub_BSHD: output rows by slot.
        rows_BGS: the pyramid's rows of the slots.
        inverse_BGP: the slots of the pyramid's rows, or -1.
        shape: the pyramid over the tokens held here.
        num_chunks: C.
        halo_CLBHD: `last_rows` of the chunk before each chunk, zero before the first. None: zero everywhere.

    Returns:
        [B, N, H, D] in sub's dtype, each position's at most L rows summed in the accumulation dtype.
    """
    dtype = torch.promote_types(sub_BSHD.dtype, torch.float32)
    tokens, *coarser = take(sub_BSHD, inverse_BGP, rows_BGS).split(shape.sizes, dim=1)
    out_BCnHD = tokens.to(dtype).unflatten(1, (num_chunks, -1))
    chunk_len = out_BCnHD.shape[2]
    for level, rows_BRHD in enumerate(coarser, start=1):
        rows = rows_BRHD.to(dtype).unflatten(1, (num_chunks, -1))
        no_rows = torch.zeros_like(rows[:, :, :1])
        before = no_rows if halo_CLBHD is None else halo_CLBHD[:, level - 1].transpose(0, 1).unsqueeze(2)
        window = shape.pooling_factor**level
        repeated = torch.cat([before, rows], dim=2).unsqueeze(3).expand(-1, -1, -1, window, -1, -1).flatten(2, 3)
        out_BCnHD = out_BCnHD + repeated[:, :, 1 : chunk_len + 1]
    out_BNHD: Tensor = out_BCnHD.flatten(1, 2)
    return out_BNHD.to(sub_BSHD.dtype)
