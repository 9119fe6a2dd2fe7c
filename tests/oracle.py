"""Brute-force oracle of Lighthouse attention: plain loops written from the definitions, and slow.

It judges every implementation, so it shares no code with any of them. Clarity over speed: N up to about 256.

Entry (l, i) covers tokens [i p^l, (i+1) p^l); its end is (i+1) p^l - 1. Its flat index is offset(l) + i, with
offset(0) = 0 and offset(l+1) = offset(l) + N/p^l.

Shape suffixes: B batch, N tokens, H query heads, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

Entries = Sequence[int]
"""Flat indices of one sequence and one KV head, ordered by (end, level)."""


def pyramid_offsets(n: int, num_levels: int, pooling_factor: int) -> list[int]:
    """First flat index of each level, for `n` tokens."""
    offsets = [0]
    for level in range(num_levels - 1):
        offsets.append(offsets[-1] + n // pooling_factor**level)
    return offsets


def level_and_index(flat: int, n: int, num_levels: int, pooling_factor: int) -> tuple[int, int]:
    """(l, i) of a flat index."""
    offsets = pyramid_offsets(n, num_levels, pooling_factor)
    level = max(candidate for candidate in range(num_levels) if offsets[candidate] <= flat)
    return level, flat - offsets[level]


def end_of(level: int, index: int, pooling_factor: int) -> int:
    """The last token that entry (level, index) covers."""
    return (index + 1) * int(pooling_factor**level) - 1


def kv_head_of(head: int, num_heads: int, num_kv_heads: int) -> int:
    """The KV head of a query head: consecutive query heads share one."""
    return head // (num_heads // num_kv_heads)


def norm_scores(q_BNHD: torch.Tensor, k_BNHD: torch.Tensor, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Level-0 scores: the norm of the stacked query rows of a KV head's group, and of its key row.

    Args:
        q_BNHD: [B, N, H, D], any dtype.
        k_BNHD: [B, N, num_kv_heads, D].
        num_kv_heads: divides H.

    Returns:
        (query_scores, key_scores), each float64 [B, num_kv_heads, N].
    """
    batch, n, num_heads, _ = q_BNHD.shape
    query_scores = torch.zeros(batch, num_kv_heads, n, dtype=torch.float64)
    key_scores = torch.zeros(batch, num_kv_heads, n, dtype=torch.float64)
    for b in range(batch):
        for kv_head in range(num_kv_heads):
            group = [h for h in range(num_heads) if kv_head_of(h, num_heads, num_kv_heads) == kv_head]
            for t in range(n):
                stacked = [x for h in group for x in q_BNHD[b, t, h].tolist()]
                query_scores[b, kv_head, t] = math.sqrt(math.fsum(x * x for x in stacked))
                row = k_BNHD[b, t, kv_head].tolist()
                key_scores[b, kv_head, t] = math.sqrt(math.fsum(x * x for x in row))
    return query_scores, key_scores


def select(
    query_scores: torch.Tensor,
    key_scores: torch.Tensor,
    num_levels: int,
    pooling_factor: int,
    topk: int,
    num_strata: int,
    cover_prefix: bool,
) -> list[list[list[int]]]:
    """The entries of the sub-sequence, [b][kv_head] -> flat indices ordered by (end, level).

    Args:
        query_scores: level-0 scores, float32 or float64 [B, H_kv, N], >= 0 or NaN. Coarser scores are the
            maximum over children. All comparisons are of bit patterns, so NaN ranks above inf.
        key_scores: the same for keys.
        num_levels: L.
        pooling_factor: p.
        topk: budget per level over the whole sequence.
        num_strata: equal runs of tokens, each with budget topk / num_strata.
        cover_prefix: always select entry 0 of every level >= 1.
    """
    batch, num_kv_heads, _ = query_scores.shape
    selection = []
    for b in range(batch):
        of_sequence = []
        for kv_head in range(num_kv_heads):
            query = _score_pyramid(_bit_patterns(query_scores[b, kv_head]), num_levels, pooling_factor)
            key = _score_pyramid(_bit_patterns(key_scores[b, kv_head]), num_levels, pooling_factor)
            chosen = _select_one_head(query, key, pooling_factor, topk, num_strata, cover_prefix)
            of_sequence.append(chosen)
        selection.append(of_sequence)
    return selection


def _select_one_head(
    query: list[list[int]],
    key: list[list[int]],
    pooling_factor: int,
    topk: int,
    num_strata: int,
    cover_prefix: bool,
) -> list[int]:
    """`select` of one sequence and KV head, given the scores of every level."""
    n, num_levels = len(query[0]), len(query)
    length, budget = n // num_strata, topk // num_strata
    chosen = []
    for first in range(0, n, length):
        chosen += _select_one_stratum(first, length, query, key, pooling_factor, budget, cover_prefix)
    chosen.sort(key=lambda entry: (end_of(entry[0], entry[1], pooling_factor), entry[0]))
    offsets = pyramid_offsets(n, num_levels, pooling_factor)
    return [offsets[level] + index for level, index in chosen]


def _bit_patterns(scores: torch.Tensor) -> list[int]:
    """The scores' bits as unsigned integers: ordered like the scores, with NaN on top."""
    values = scores.detach().contiguous().numpy()
    patterns: list[int] = values.view({4: np.uint32, 8: np.uint64}[values.itemsize]).tolist()
    return patterns


def _score_pyramid(scores: list[int], num_levels: int, pooling_factor: int) -> list[list[int]]:
    """Scores of every level; an entry of level >= 1 has the maximum of its children."""
    levels = [scores]
    for _ in range(num_levels - 1):
        finer = levels[-1]
        starts = range(0, len(finer), pooling_factor)
        levels.append([max(finer[start : start + pooling_factor]) for start in starts])
    return levels


def _select_one_stratum(
    first: int,
    length: int,
    query: list[list[int]],
    key: list[list[int]],
    pooling_factor: int,
    budget: int,
    cover_prefix: bool,
) -> list[tuple[int, int]]:
    """Every candidate (level, index) of the stratum's tokens [first, first + length), coarsest first."""
    level = len(query) - 1
    window = pooling_factor**level
    candidates = list(range(first // window, (first + length) // window))
    chosen = [(level, index) for index in candidates]
    while level > 0:
        selected = _pick(candidates, query[level], key[level], budget, cover_prefix)
        level -= 1
        candidates = [index * pooling_factor + child for index in selected for child in range(pooling_factor)]
        chosen += [(level, index) for index in candidates]
    return chosen


def _pick(candidates: list[int], query: list[int], key: list[int], budget: int, cover_prefix: bool) -> list[int]:
    """The budget//2 best by query score, then the best of the rest by key score; ties: lower index first."""

    def query_rank(index: int) -> tuple[bool, int, int]:
        covers_prefix = cover_prefix and index == 0
        return not covers_prefix, -query[index], index

    by_query = sorted(candidates, key=query_rank)[: budget // 2]
    rest = [index for index in candidates if index not in by_query]
    by_key = sorted(rest, key=lambda index: (-key[index], index))[: budget - budget // 2]
    return by_query + by_key


def attention(
    q_BNHD: torch.Tensor,
    k_BNHD: torch.Tensor,
    v_BNHD: torch.Tensor,
    entries: Sequence[Sequence[Entries]],
    num_levels: int,
    pooling_factor: int,
) -> torch.Tensor:
    """Lighthouse attention at a given selection; differentiable. The reference is its result in float64.

    Args:
        q_BNHD: [B, N, H, D].
        k_BNHD: [B, N, H_kv, D]; H_kv divides H.
        v_BNHD: [B, N, H_kv, D].
        entries: [b][kv_head] -> flat indices, as `select` returns.
        num_levels: L.
        pooling_factor: p.

    Returns:
        [B, N, H, D], in the dtype of the input.
    """
    batch, n, num_heads, _ = q_BNHD.shape
    of_sequences = []
    for b in range(batch):
        of_heads = []
        for head in range(num_heads):
            kv_head = kv_head_of(head, num_heads, k_BNHD.shape[2])
            chosen = entries[b][kv_head]
            q = pooled_rows(q_BNHD[b, :, head], chosen, num_levels, pooling_factor)
            k = pooled_rows(k_BNHD[b, :, kv_head], chosen, num_levels, pooling_factor)
            v = pooled_rows(v_BNHD[b, :, kv_head], chosen, num_levels, pooling_factor)
            out = _causal_attention(q, k, v)
            of_heads.append(scattered_rows(out, chosen, n, num_levels, pooling_factor))
        of_sequences.append(torch.stack(of_heads, dim=1))
    return torch.stack(of_sequences)


def pooled_rows(x_ND: torch.Tensor, entries: Entries, num_levels: int, pooling_factor: int) -> torch.Tensor:
    """Row s is the mean of the tokens under entry s: [S, D]."""
    rows = []
    for flat in entries:
        level, index = level_and_index(flat, len(x_ND), num_levels, pooling_factor)
        window = pooling_factor**level
        rows.append(x_ND[index * window : (index + 1) * window].mean(dim=0))
    return torch.stack(rows)


def _causal_attention(q_SD: torch.Tensor, k_SD: torch.Tensor, v_SD: torch.Tensor) -> torch.Tensor:
    """Row s attends to rows 0..s, with scale 1/sqrt(D)."""
    rows = []
    for s in range(len(q_SD)):
        weights = torch.softmax(k_SD[: s + 1] @ q_SD[s] / math.sqrt(q_SD.shape[1]), dim=0)
        rows.append(weights @ v_SD[: s + 1])
    return torch.stack(rows)


def scattered_rows(
    out_SD: torch.Tensor, entries: Entries, n: int, num_levels: int, pooling_factor: int
) -> torch.Tensor:
    """Each position's sum of the rows that reach it: [n, D]."""
    received = _slots_received(entries, n, num_levels, pooling_factor)
    return torch.stack([out_SD[slots].sum(dim=0) for slots in received])


def fan_in(entries: Entries, n: int, num_levels: int, pooling_factor: int) -> list[int]:
    """How many output rows each of the `n` positions receives."""
    return [len(slots) for slots in _slots_received(entries, n, num_levels, pooling_factor)]


def _slots_received(entries: Entries, n: int, num_levels: int, pooling_factor: int) -> list[list[int]]:
    """The slots whose rows reach each position: entry (l, i) writes to [(i+1)p^l-1, (i+2)p^l-2], cut at n."""
    received: list[list[int]] = [[] for _ in range(n)]
    for slot, flat in enumerate(entries):
        level, index = level_and_index(flat, n, num_levels, pooling_factor)
        window = pooling_factor**level
        first = (index + 1) * window - 1
        last = (index + 2) * window - 2
        for position in range(first, min(last, n - 1) + 1):
            received[position].append(slot)
    return received
