"""The top-K cascade, one program for each sequence, KV head and stratum: no global sort, no atomics.

The last of the selected, by key and then by index, is found by building its key bit by bit. Whether a candidate is
selected then follows from its own key and index, so candidates come in index order and any number of them can be
streamed. Slots follow from ranks: before an entry lie the earlier candidates of its own level and of each coarser one
up to its ancestor, and, level by level downwards, the children of all that was selected up to there.

Keys are the bit patterns of scores. What is out of the running has the smallest integer, which no score has.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lhcp.kernels.lighthouse.pyramid import PyramidShape
from lhcp.kernels.lighthouse.tile import power_of_two

LARGEST_BLOCK = 4096
"""Candidates that a program holds in registers; more are streamed."""
SMALLEST: tl.constexpr = tl.constexpr(-(2**31))
LARGEST: tl.constexpr = tl.constexpr(2**31 - 1)


@triton.jit
def _reaching(keys, start, key, last, BLOCK: tl.constexpr):
    """How many of a block's keys are above `key`, or equal to it at an index of at most `last`."""
    c = start + tl.arange(0, BLOCK)
    return tl.sum(((keys > key) | ((keys == key) & (c <= last))).to(tl.int32), 0)


@triton.jit
def _reaching_of_all(at, held, count, key, last, ONE: tl.constexpr, BLOCK: tl.constexpr):
    """`_reaching` over `count` keys: those `held`, if they are all in ONE block, else those stored at `at`."""
    if ONE:
        found = _reaching(held, 0, key, last, BLOCK)
    else:
        found = 0
        for start in range(0, count, BLOCK):
            c = start + tl.arange(0, BLOCK)
            found += _reaching(tl.load(at + c, mask=c < count, other=SMALLEST), start, key, last, BLOCK)
    return found


@triton.jit
def _last_of_best(at, count, want, INDEX_BITS: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr):
    """Key and index of the last of the `want` largest of `count` keys, equal keys by index."""
    c = tl.arange(0, BLOCK)
    held = tl.load(at + c, mask=c < count, other=SMALLEST)
    key = tl.full([], SMALLEST, tl.int32)  # the largest that `want` keys reach
    one = tl.full([], 1, tl.int32)
    for bit in range(32):
        trial = key ^ (one << (31 - bit))
        key = tl.where(_reaching_of_all(at, held, count, trial, count, ONE, BLOCK) >= want, trial, key)
    index = tl.full([], 0, tl.int32)  # the first at which `want` reach it
    for bit in range(INDEX_BITS):
        trial = index | (one << (INDEX_BITS - 1 - bit))
        index = tl.where(_reaching_of_all(at, held, count, key, trial - 1, ONE, BLOCK) < want, trial, index)
    return key, index


@triton.jit
def _entry(chosen, c, exists, TOP: tl.constexpr, P: tl.constexpr):
    """Entry of candidate c: all of the coarsest level are candidates, below it the children of the chosen."""
    return c if TOP else tl.load(chosen + c // P, mask=exists, other=0) * P + c % P


@triton.jit
def _select_kernel(
    query_bits, key_bits, rows, scratch,
    tokens, stratum_len, strata, scored, slots, budget, most, cover, scratch_size,
    L: tl.constexpr, P: tl.constexpr, INDEX_BITS: tl.constexpr, ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = (tl.program_id(0) // strata).to(tl.int64)
    stratum = tl.program_id(0) % strata
    query_bits += head * scored
    key_bits += head * scored
    rows += head * strata * slots + stratum * slots
    query_keys = scratch + tl.program_id(0).to(tl.int64) * scratch_size
    key_keys = query_keys + most
    # By level, the coarsest first: chosen entries, their places among the candidates, and how many were
    # chosen up to each candidate.
    chosen = key_keys + most
    place = chosen + (L - 1) * budget
    upto = place + (L - 1) * budget
    coarsest = stratum_len // P ** (L - 1)

    for step in tl.static_range(L - 1):
        count = coarsest if step == 0 else budget * P
        parents = chosen + (step - 1) * budget
        before = 0 if step == 0 else coarsest + (step - 1) * budget * P
        first = stratum * (stratum_len // P ** (L - 1 - step))
        for finer in tl.static_range(1, L - 1 - step):
            first += tokens // P**finer

        for start in range(0, count, BLOCK):
            c = start + tl.arange(0, BLOCK)
            exists = c < count
            entry = first + _entry(parents, c, exists, step == 0, P)
            by_query = tl.load(query_bits + entry, mask=exists, other=SMALLEST)
            by_query = tl.where((c == 0) & (stratum == 0) & (cover != 0), LARGEST, by_query)
            tl.store(query_keys + c, by_query, mask=exists)
            tl.store(key_keys + c, tl.load(key_bits + entry, mask=exists, other=SMALLEST), mask=exists)
        tl.debug_barrier()
        query_key, query_index = _last_of_best(query_keys, count, budget // 2, INDEX_BITS, ONE, BLOCK)
        for start in range(0, count, BLOCK):
            c = start + tl.arange(0, BLOCK)
            key = tl.load(query_keys + c, mask=c < count, other=SMALLEST)
            selected = (key > query_key) | ((key == query_key) & (c <= query_index))
            tl.store(key_keys + c, SMALLEST, mask=selected)
        tl.debug_barrier()
        key_key, key_index = _last_of_best(key_keys, count, budget - budget // 2, INDEX_BITS, ONE, BLOCK)
        total = 0
        for start in range(0, count, BLOCK):
            c = start + tl.arange(0, BLOCK)
            exists = c < count
            key = tl.load(query_keys + c, mask=exists, other=SMALLEST)
            selected = (key > query_key) | ((key == query_key) & (c <= query_index))
            key = tl.load(key_keys + c, mask=exists, other=SMALLEST)
            selected |= (key > key_key) | ((key == key_key) & (c <= key_index))
            selected &= exists
            upto_c = total + tl.cumsum(selected.to(tl.int32), 0)
            total += tl.sum(selected.to(tl.int32), 0)
            entry = _entry(parents, c, exists, step == 0, P)
            tl.store(upto + before + c, upto_c, mask=exists)
            tl.store(chosen + step * budget + upto_c - 1, entry, mask=selected)
            tl.store(place + step * budget + upto_c - 1, c, mask=selected)
        tl.debug_barrier()

    for step in tl.static_range(L):
        count = coarsest if step == 0 else budget * P
        first = stratum * (stratum_len // P ** (L - 1 - step))
        for finer in tl.static_range(L - 1 - step):
            first += tokens // P**finer
        for start in range(0, count, BLOCK):
            c = start + tl.arange(0, BLOCK)
            exists = c < count
            slot = c
            ancestor = c
            for coarser in tl.static_range(step):
                ancestor = tl.load(place + (step - 1 - coarser) * budget + ancestor // P, mask=exists, other=0)
                slot += ancestor
            children = c + 1
            for down in tl.static_range(step, L - 1):
                before = 0 if down == 0 else coarsest + (down - 1) * budget * P
                children = P * tl.load(upto + before + children - 1, mask=exists & (children > 0), other=0)
                slot += children
            entry = first + _entry(chosen + (step - 1) * budget, c, exists, step == 0, P)
            tl.store(rows + slot, entry, mask=exists)


def select(
    query_bits_BGE: Tensor, key_bits_BGE: Tensor, shape: PyramidShape, strata: int, budget: int, cover: bool
) -> Tensor:
    """See `reference.select`; bits are int32 and contiguous."""
    batch, groups, scored = query_bits_BGE.shape
    levels, p = shape.num_levels, shape.pooling_factor
    coarsest, children = shape.sizes[-1] // strata, budget * p
    most = max(coarsest, children)
    block = min(LARGEST_BLOCK, power_of_two(most))
    slots = coarsest + (levels - 1) * children
    scratch_size = 2 * most + (levels - 1) * 2 * budget + coarsest + (levels - 2) * children
    programs = batch * groups * strata
    rows = query_bits_BGE.new_empty(batch, groups, strata * slots)
    scratch = query_bits_BGE.new_empty(programs, scratch_size)
    _select_kernel[(programs,)](
        query_bits_BGE, key_bits_BGE, rows, scratch,
        shape.length, shape.length // strata, strata, scored, slots, budget, most, int(cover), scratch_size,
        L=levels, P=p, INDEX_BITS=(most - 1).bit_length(), ONE=most <= block, BLOCK=block,
        num_warps=max(1, min(8, block // 128)),
    )  # fmt: skip
    return rows
