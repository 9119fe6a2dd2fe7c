"""The oracle against cases worked out by hand."""

from __future__ import annotations

import math

import torch

import oracle


def scores(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(1, 1, -1)


def test_offsets_and_norms_over_a_query_group() -> None:
    # 18 tokens, p = 3: levels of 18, 6 and 2 entries.
    assert oracle.pyramid_offsets(18, 3, 3) == [0, 18, 24]
    # The rows of the two query heads stack to (3, 0, 0, 4), of norm 5; the key row is (6, 8), of norm 10.
    q = torch.tensor([3.0, 0.0, 0.0, 4.0]).reshape(1, 1, 2, 2)
    k = torch.tensor([6.0, 8.0]).reshape(1, 1, 1, 2)
    query_scores, key_scores = oracle.norm_scores(q, k, 1)
    assert query_scores.tolist() == [[[5.0]]]
    assert key_scores.tolist() == [[[10.0]]]


# Level 1 (p = 2) has query scores 2 9 3 5 and key scores 1 8 4 4; the budget of 2 is one of each kind.
QUERY = scores(1, 2, 9, 0, 3, 3, 0, 5)
KEY = scores(0, 1, 8, 8, 4, 2, 4, 0)


def test_two_levels_one_stratum() -> None:
    # By query entry 1; of the rest (keys 1 4 4) entry 2, the lower index of a tie: leaves 2 3 4 5.
    # Ends: coarse 8 9 10 11 at 1 3 5 7, leaf t at t, and a leaf comes before the coarse entry of its end.
    [[entries]] = oracle.select(QUERY, KEY, 2, 2, topk=2, num_strata=1, cover_prefix=False)
    assert entries == [8, 2, 3, 9, 4, 5, 10, 11]
    # Coarse rows go to 1-2, 3-4, 5-6, 7(-8); leaves to 2, 3, 4, 5. Nothing reaches position 0.
    assert oracle.fan_in(entries, 8, 2, 2) == [0, 1, 2, 2, 2, 2, 1, 1]


def test_prefix_cover_takes_a_query_place() -> None:
    # Entry 0 takes the one query place; of the rest (keys 8 4 4) entry 1: leaves 0 1 2 3.
    [[entries]] = oracle.select(QUERY, KEY, 2, 2, topk=2, num_strata=1, cover_prefix=True)
    assert entries == [0, 1, 8, 2, 3, 9, 10, 11]
    assert oracle.fan_in(entries, 8, 2, 2) == [1, 2, 2, 2, 1, 1, 1, 1]


def test_odd_budget_rounds_the_query_share_down() -> None:
    # Budget 3 of level 1 is one by query (7 9 9 5: entry 1, the lower of the tie) and two by key of the rest
    # (6 . 1 4: entries 0 and 3): leaves 0 1 2 3 6 7.
    query = scores(7, 0, 9, 0, 9, 0, 5, 0)
    key = scores(6, 0, 8, 0, 1, 0, 4, 0)
    [[entries]] = oracle.select(query, key, 2, 2, topk=3, num_strata=1, cover_prefix=False)
    assert entries == [0, 1, 8, 2, 3, 9, 10, 6, 7, 11]


def test_three_levels_two_strata() -> None:
    # Tokens 0-7 and 8-15 select on their own, both of their 2 coarsest entries (flat 24 25 and 26 27).
    # Level 1 (flat 16-23): the first stratum has queries 1 5 2 7, keys 9 0 9 0: by query entry 3, then by
    # key entry 0 (tied with 2): leaves 6 7 and 0 1. The second has queries 3 3 3 3, keys 0 0 0 6: entries
    # 4 and 7: leaves 8 9 and 14 15.
    query = scores(0, 1, 5, 0, 2, 0, 7, 7, 3, 3, 0, 3, 3, 0, 1, 3)
    key = scores(9, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 6, 0)
    [[entries]] = oracle.select(query, key, 3, 2, topk=4, num_strata=2, cover_prefix=False)
    first = [0, 1, 16, 17, 24, 18, 6, 7, 19, 25]
    second = [8, 9, 20, 21, 26, 22, 14, 15, 23, 27]
    assert entries == first + second


def test_nan_ranks_above_inf_and_is_inherited() -> None:
    # Level 1 queries: 1, nan, inf, 2. By query the nan; of the rest the best key is entry 3.
    query = scores(1, 0, 0, math.nan, math.inf, 9, 2, 2)
    key = scores(0, 0, 9, 9, 1, 1, 3, 3)
    [[entries]] = oracle.select(query, key, 2, 2, topk=2, num_strata=1, cover_prefix=False)
    assert sorted(entries) == [2, 3, 6, 7, 8, 9, 10, 11]


def test_attention_values() -> None:
    # All of 4 tokens and their 2 pairs, in order: tokens 0 1, pair (flat 4), tokens 2 3, pair (flat 5).
    entries = [[[0, 1, 4, 2, 3, 5]]]
    # Four dimensions, so the scale is 1/2: queries of 2 make the logits equal the keys.
    along = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    values_along = torch.tensor([1.0, 10.0, 0.0, -1.0], dtype=torch.float64)
    q = torch.outer(torch.tensor([2.0, 2.0, 0.0, 0.0], dtype=torch.float64), along)
    k = torch.outer(torch.tensor([0.0, math.log(3.0), 0.0, 0.0], dtype=torch.float64), along)
    v = torch.outer(torch.tensor([2.0, 4.0, 6.0, 8.0], dtype=torch.float64), values_along)
    # Values per slot 2 4 3 6 8 7. Slots 0 1 2 have query 2 over keys 0, ln 3, ln(3)/2: weights 1 3 sqrt(3).
    # Slots 3 4 5 have query 0: plain means.
    root = math.sqrt(3.0)
    rows = [2.0, (2 + 3 * 4) / 4, (2 + 3 * 4 + root * 3) / (4 + root), 15 / 4, 23 / 5, 30 / 6]
    # Token t goes to t; the pairs to 1-2 and 3.
    expected = [rows[0], rows[1] + rows[2], rows[3] + rows[2], rows[4] + rows[5]]
    out = oracle.attention(*(x.reshape(1, 4, 1, 4) for x in (q, k, v)), entries, 2, 2)
    wanted = torch.outer(torch.tensor(expected, dtype=torch.float64), values_along)
    torch.testing.assert_close(out[0, :, 0], wanted, rtol=1e-14, atol=0)


def test_query_heads_use_the_entries_of_their_kv_head() -> None:
    # Two groups of two query heads; with query 0 attention is a running mean over the group's own entries.
    # KV head 0 keeps tokens 0 1, KV head 1 keeps tokens 2 3, both keep the pairs (values: v and 10 v).
    entries = [[[0, 1, 4, 5], [4, 2, 3, 5]]]
    q = torch.zeros(1, 4, 4, 1, dtype=torch.float64)
    k = torch.ones(1, 4, 2, 1, dtype=torch.float64)
    one_head = torch.tensor([2.0, 4.0, 6.0, 8.0], dtype=torch.float64)
    v = torch.stack([one_head, 10 * one_head], dim=1).reshape(1, 4, 2, 1)
    # KV head 0: values 2 4 3 7, running means 2 3 3 4, to positions 0, 1, 1-2, 3.
    # KV head 1: values 30 60 80 70, running means 30 45 170/3 60, to positions 1-2, 2, 3, 3.
    first = [2.0, 6.0, 3.0, 4.0]
    second = [0.0, 30.0, 75.0, 170 / 3 + 60]
    out = oracle.attention(q, k, v, entries, 2, 2)[0, :, :, 0]
    expected = torch.tensor([first, first, second, second], dtype=torch.float64).T
    torch.testing.assert_close(out, expected, rtol=1e-14, atol=0)
