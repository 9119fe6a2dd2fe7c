"""Specification of the Lighthouse kernels in plain PyTorch: any device, any float dtype, differentiable.

It is also the CPU path. Rows are summed in the accumulation dtype: float64 for float64, else float32. Nothing
here communicates: a chunk's last rows leave through `last_rows` and come in through `halo_CLBHD`.

Shape suffixes: B batch, N tokens held here, H query heads, G KV heads, D head width, L levels, p pooling
factor, P pyramid rows (sum over levels of N/p^l), S gathered rows, T strata, C chunks, m budget per stratum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pool(x_BNHD: Tensor, num_levels: int, pooling_factor: int) -> Tensor:
    """All pyramid levels, concatenated: means of p^l consecutive rows.

    Accumulated in the accumulation dtype and rounded once. Level 0 goes through the same cast, so that the
    gradients of a token's rows at the different levels are summed before they are rounded.

    Returns:
        [B, P, H, D] in x's dtype: level 0 (x itself), then level 1, ...
    """
    level = x_BNHD.to(torch.promote_types(x_BNHD.dtype, torch.float32))
    levels = [level]
    for _ in range(num_levels - 1):
        level = level.unflatten(1, (-1, pooling_factor)).mean(2)
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


def score_bits(scores: Tensor) -> Tensor:
    """Bit patterns of non-negative scores as integers that order the same way.

    A NaN lies above inf, or below 0 when its sign bit is set: any order will do, as long as it is one. Adding
    zero turns -0.0, whose pattern is the smallest integer, into 0.0.
    """
    return (scores + 0.0).view(torch.int64 if scores.dtype == torch.float64 else torch.int32)


def _top(keys: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest along the last dimension; equal keys: lower index first."""
    return keys.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def select_entries(
    query_bits_BGTn: Tensor,
    key_bits_BGTn: Tensor,
    num_levels: int,
    pooling_factor: int,
    budget: int,
    cover_T: Tensor,
) -> tuple[Tensor, Tensor]:
    """The top-down cascade in each stratum: which entries are gathered, in order of (end, level).

    From the coarsest level down, of a level's candidates the budget // 2 with the highest query scores are
    selected, then of the rest the highest key scores; the children of the selected are the next candidates.
    Every candidate is gathered.

    Args:
        query_bits_BGTn: `score_bits` of the level-0 query scores, n tokens per stratum.
        key_bits_BGTn: likewise, of the key scores.
        budget: m, entries selected per level in one stratum.
        cover_T: bool, true for a stratum whose entry 0 is selected at every level.

    Returns:
        level and index, int64 [B, G, T, S / T]; an index counts a level's entries from the stratum's start.
    """
    highest = torch.iinfo(query_bits_BGTn.dtype).max
    lowest = torch.iinfo(query_bits_BGTn.dtype).min
    query, key = [query_bits_BGTn], [key_bits_BGTn]
    for _ in range(num_levels - 1):
        query.append(query[-1].unflatten(-1, (-1, pooling_factor)).amax(-1))
        key.append(key[-1].unflatten(-1, (-1, pooling_factor)).amax(-1))

    child = torch.arange(pooling_factor, device=query_bits_BGTn.device)
    candidates = torch.arange(query[-1].shape[-1], device=query_bits_BGTn.device).expand(query[-1].shape)
    levels, indices = [], []
    for level in range(num_levels - 1, 0, -1):
        levels.append(torch.full_like(candidates, level))
        indices.append(candidates)
        by_query = query[level].gather(-1, candidates)
        # Entry 0 is the first candidate of a covered stratum: at the top by its cover, below as its child.
        by_query[..., 0].masked_fill_(cover_T, highest)
        by_query = _top(by_query, budget // 2)
        by_key = key[level].gather(-1, candidates).scatter_(-1, by_query, lowest)
        by_key = _top(by_key, budget - budget // 2)
        selected = candidates.gather(-1, torch.cat([by_query, by_key], -1).sort(-1).values)
        candidates = (selected.unsqueeze(-1) * pooling_factor + child).flatten(-2)
    levels.append(torch.zeros_like(candidates))
    indices.append(candidates)

    level_BGTS, index_BGTS = torch.cat(levels, -1), torch.cat(indices, -1)
    end = (index_BGTS + 1) * pooling_factor**level_BGTS - 1
    order = (end * num_levels + level_BGTS).argsort(-1)
    return level_BGTS.gather(-1, order), index_BGTS.gather(-1, order)


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


class _Gather(torch.autograd.Function):
    """`take_rows` whose backward takes rows too, through the inverse index: no atomics, no summation order."""

    @staticmethod
    def forward(ctx: Any, rows_BRHD: Tensor, index_BGQ: Tensor, inverse_BGR: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_BGR)
        return take_rows(rows_BRHD, index_BGQ)

    @staticmethod
    def backward(ctx: Any, grad_BQHD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_BGR,) = ctx.saved_tensors
        return take_rows(grad_BQHD, inverse_BGR), None, None


def gather(rows_BRHD: Tensor, index_BGQ: Tensor, inverse_BGR: Tensor) -> Tensor:
    """Differentiable `take_rows`. `index` and `inverse` are partial inverses of each other, -1 where undefined."""
    out: Tensor = _Gather.apply(rows_BRHD, index_BGQ, inverse_BGR)  # type: ignore[no-untyped-call]
    return out


def last_rows(pyramid_BPHD: Tensor, level_sizes: list[int], num_chunks: int) -> Tensor:
    """The last row of every level >= 1 in each chunk: what a chunk writes into the next one.

    Returns:
        [C, L - 1, B, H, D] in the accumulation dtype.
    """
    levels = pyramid_BPHD.split(level_sizes, dim=1)[1:]
    last = [level.unflatten(1, (num_chunks, -1))[:, :, -1] for level in levels]
    rows_CLBHD = torch.stack(last).permute(2, 0, 1, 3, 4)
    return rows_CLBHD.to(torch.promote_types(pyramid_BPHD.dtype, torch.float32)).contiguous()


def scatter_back(
    pyramid_BPHD: Tensor, level_sizes: list[int], num_chunks: int, pooling_factor: int, halo_CLBHD: Tensor
) -> Tensor:
    """Add entry (l, i) to positions (i+1) p^l - 1 .. (i+2) p^l - 2, as a gather.

    Position t receives row (t+1) // p^l - 1 of each level, so a level's rows, each repeated p^l times behind
    the previous chunk's last row, only have to be shifted by one.

    Args:
        pyramid_BPHD: output rows by entry, zero where an entry was not gathered.
        level_sizes: rows of each level, N / p^l.
        halo_CLBHD: `last_rows` of the chunk before each chunk, zero before the first.

    Returns:
        [B, N, H, D] in the pyramid's dtype, each position's at most L rows summed in the accumulation dtype.
    """
    dtype = torch.promote_types(pyramid_BPHD.dtype, torch.float32)
    tokens, *coarser = pyramid_BPHD.split(level_sizes, dim=1)
    out_BCnHD = tokens.to(dtype).unflatten(1, (num_chunks, -1))
    chunk_len = out_BCnHD.shape[2]
    for level, rows_BRHD in enumerate(coarser, start=1):
        before = halo_CLBHD[:, level - 1].transpose(0, 1).unsqueeze(2)
        rows = torch.cat([before, rows_BRHD.to(dtype).unflatten(1, (num_chunks, -1))], dim=2)
        window = pooling_factor**level
        repeated = rows.unsqueeze(3).expand(-1, -1, -1, window, -1, -1).flatten(2, 3)
        out_BCnHD = out_BCnHD + repeated[:, :, 1 : chunk_len + 1]
    out_BNHD: Tensor = out_BCnHD.flatten(1, 2)
    return out_BNHD.to(pyramid_BPHD.dtype)
