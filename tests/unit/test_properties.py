"""What holds for every legal shape and every layout, with the ranks as threads of this process.

Shape suffixes: B batch, N tokens, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from lhcp.attention import LighthouseConfig, lighthouse_attention, select
from lhcp.config import ExchangeName
from lhcp.distributed import ContextParallel
from lhcp.distributed.order import joined, parted
from lhcp.distributed.sharding import ChunkLayout
from lhcp.distributed.threads import ThreadCommunicator, run_threads

T = TypeVar("T")
WIDTH = 3
LAYOUTS = [ChunkLayout(world, sharding) for world in range(2, 9) for sharding in ("zigzag", "contiguous")]
ANY_LAYOUT = st.sampled_from([ChunkLayout(1, "zigzag"), ChunkLayout(1, "contiguous"), *LAYOUTS])


@pytest.fixture(autouse=True, scope="module")
def _poison_uninitialized_memory() -> Iterator[None]:
    """torch.empty is filled with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def on_every_rank(
    layout: ChunkLayout, function: Callable[[ContextParallel], T], exchange: ExchangeName = "ring"
) -> Sequence[T]:
    """What `function` returns on each rank of `layout`."""

    def rank(communicator: ThreadCommunicator) -> T:
        return function(ContextParallel(sharding=layout.sharding, exchange=exchange, communicator=communicator))

    return run_threads(layout.world, rank)


def whole_numbers(shape: Sequence[int], seed: int, largest: int = 9) -> Tensor:
    """Sums and products of them are exact."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, tuple(shape), generator=generator).double()


# --- order, shards and halo ---


@given(ANY_LAYOUT, st.lists(st.integers(1, 3), min_size=1, max_size=4), st.data())
def test_parted_and_joined_follow_the_runs(layout: ChunkLayout, shape: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] *= layout.num_chunks
    x = torch.arange(math.prod(shape)).view(shape)
    shards = parted(x, dim, layout)
    assert torch.equal(joined(shards, dim, layout), x)
    for rank in range(layout.world):
        runs = layout.runs(rank, shape[dim])
        assert torch.equal(shards[rank], torch.cat([x.narrow(dim, start, stop - start) for start, stop in runs], dim))
    arbitrary = x.view(shards.shape)
    assert torch.equal(parted(joined(arbitrary, dim, layout), dim, layout), arbitrary)


@settings(max_examples=40)
@given(ANY_LAYOUT, st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(0, 99), st.data())
def test_shard_and_unshard_are_inverse(layout: ChunkLayout, shape: list[int], seed: int, data: st.DataObject) -> None:
    """Their gradients too: a whole tensor's gradient is whole on every rank."""
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] *= layout.num_chunks
    whole, weights = whole_numbers([2, *shape], seed)
    shards, weight_shards = (parted(x, dim, layout) for x in (whole, weights))

    def check(cp: ContextParallel) -> None:
        x, shard = whole.clone().requires_grad_(), shards[cp.rank].clone().requires_grad_()
        sharded, unsharded = cp.shard(x, dim), cp.unshard(shard, dim)
        assert torch.equal(sharded, shards[cp.rank])
        assert torch.equal(unsharded, whole)
        assert torch.equal(torch.autograd.grad(sharded, x, weight_shards[cp.rank])[0], weights)
        assert torch.equal(torch.autograd.grad(unsharded, shard, weights)[0], weight_shards[cp.rank])
        positions = cp.positions(shape[dim])
        assert torch.equal(positions, cp.shard(torch.arange(shape[dim]), 0))
        assert torch.equal(whole.index_select(dim, positions), sharded)

    on_every_rank(layout, check)


@settings(max_examples=40)
@given(st.sampled_from(LAYOUTS), st.lists(st.integers(1, 3), max_size=4), st.integers(0, 99))
def test_halo_is_the_chunk_before_and_its_backward_the_transpose(
    layout: ChunkLayout, shape: list[int], seed: int
) -> None:
    rows, weights = whole_numbers([2, layout.num_chunks, *shape], seed)
    before = torch.cat([torch.zeros_like(rows[:1]), rows[:-1]])

    def products(cp: ContextParallel) -> tuple[float, float]:
        held = list(cp.chunks)
        x = rows[held].requires_grad_()
        halo = cp.halo(x)
        (grad,) = torch.autograd.grad(halo, x, weights[held])
        assert torch.equal(halo, before[held])
        return float((before[held] * weights[held]).sum()), float((rows[held] * grad).sum())

    applied, transposed = zip(*on_every_rank(layout, products), strict=True)
    assert sum(applied) == sum(transposed)


def test_halo_of_the_only_chunk_is_zero() -> None:
    assert torch.equal(ContextParallel().halo(torch.ones(1, 2, 3)), torch.zeros(1, 2, 3))


# --- attention ---


@dataclasses.dataclass(frozen=True)
class Case:
    """A legal shape, configuration and layout."""

    cfg: LighthouseConfig
    seq_len: int
    layout: ChunkLayout
    exchange: ExchangeName
    batch: int
    num_heads: int
    num_kv_heads: int
    ties: bool
    seed: int

    def make(self) -> list[Tensor]:
        """q, k and v; with `ties`, of few values, so that many norms are equal, and many of them 0."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        shapes = [(self.batch, self.seq_len, count, WIDTH) for count in heads]
        x = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return [each.div(2).round() for each in x] if self.ties else x


def forests(num_chunks: int, longest: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(L, p) -> (num_strata, coarsest entries of a stratum) of sequences of at most `longest` tokens."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for levels, p in itertools.product((2, 3, 4), (2, 3, 4, 5)):
        for strata in (num_chunks, 2 * num_chunks, 3 * num_chunks):
            for coarsest in range(3, longest // (strata * p ** (levels - 1)) + 1):
                found.setdefault((levels, p), []).append((strata, coarsest))
    return found


@st.composite
def cases(draw: st.DrawFn, longest: int, layouts: st.SearchStrategy[ChunkLayout]) -> Case:
    # Drawn from lists, and each number from what the ones before it leave: integers mostly come out at their smallest.
    layout = draw(layouts)
    possible = forests(layout.num_chunks, longest)
    levels, p = draw(st.sampled_from(sorted(possible)))
    strata, coarsest = draw(st.sampled_from(possible[levels, p]))
    seq_len = strata * coarsest * p ** (levels - 1)
    chunk = seq_len // layout.num_chunks
    # How equal norms are ordered is exact; how equal outputs of attention are is up to rounding.
    scorers: list[tuple[Literal["norm", "dilated"], bool]] = [("norm", False), ("norm", True), ("dilated", False)]
    scorer, ties = draw(st.sampled_from(scorers))
    cfg = LighthouseConfig(
        num_levels=levels,
        pooling_factor=p,
        topk=strata * draw(st.sampled_from(range(2, coarsest + 1))),
        num_strata=strata,
        scorer=scorer,
        dilation=draw(st.sampled_from([d for d in range(1, 7) if chunk % d == 0])),
        cover_prefix=draw(st.booleans()),
        check_finite=True,
    )
    exchange: ExchangeName = draw(st.sampled_from(["ring", "allgather", "ulysses"]))
    shared_heads = [(layout.world, 1), (1, layout.world)]
    any_heads = [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (3, 1)]
    groups, group = draw(st.sampled_from(shared_heads if exchange == "ulysses" else any_heads))
    return Case(
        cfg,
        seq_len,
        layout,
        exchange,
        batch=draw(st.sampled_from([1, 2])),
        num_heads=groups * group,
        num_kv_heads=groups,
        ties=ties,
        seed=draw(st.integers(0, 2**32)),
    )


def out_and_grads(
    attend: Callable[..., Tensor], qkv: Sequence[Tensor], weights: Tensor, cp: ContextParallel | None = None
) -> list[Tensor]:
    """The whole output and the whole gradients of q, k and v, for the gradient `weights` of the output."""
    cp = cp or ContextParallel()
    inputs = [cp.shard(x).detach().requires_grad_() for x in qkv]
    out = attend(*inputs)
    grads = torch.autograd.grad(out, inputs, cp.shard(weights))
    return [cp.unshard(x.detach()) for x in (out, *grads)]


def make_weights(q: Tensor) -> Tensor:
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], bound: float) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        assert got.shape == wanted.shape
        # What is exactly 0 may come out as rounding of what it is a difference of.
        assert torch.linalg.vector_norm(got - wanted) <= bound * torch.linalg.vector_norm(wanted).clamp(min=1)


@settings(max_examples=60)
@given(cases(320, st.sampled_from(LAYOUTS)))
def test_every_degree_selects_and_computes_what_one_rank_does(case: Case) -> None:
    q, k, v = case.make()
    weights = make_weights(q)
    expected = out_and_grads(lambda q, k, v: lighthouse_attention(q, k, v, case.cfg), (q, k, v), weights)
    whole, num_chunks = select(q, k, case.cfg, v=v), case.layout.num_chunks

    def check(cp: ContextParallel) -> None:
        q_, k_, v_ = (cp.shard(x) for x in (q, k, v))
        selection = select(q_, k_, case.cfg, v=v_, context_parallel=cp)
        assert torch.equal(cp.unshard(selection).entries, whole.entries)
        held = cp.shard(whole)
        assert torch.equal(held.entries, selection.entries)
        assert (held.config, held.seq_len) == (selection.config, selection.seq_len)
        assert (held.chunks, held.num_chunks) == (selection.chunks, selection.num_chunks) == (cp.chunks, num_chunks)
        actual = out_and_grads(
            lambda q, k, v: lighthouse_attention(q, k, v, case.cfg, context_parallel=cp), (q, k, v), weights, cp
        )
        assert_close(actual, expected, 1e-10)

    on_every_rank(case.layout, check, case.exchange)


# --- padding ---


def scores(q_BNHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor, cfg: LighthouseConfig) -> list[Tensor]:
    """Level-0 scores of queries and keys, [B, G, N], from the definitions."""
    groups = k_BNGD.shape[2]
    if cfg.scorer == "norm":
        return list(oracle.norm_scores(q_BNHD, k_BNGD, groups))
    t = torch.arange(q_BNHD.shape[1])
    earlier = t.unsqueeze(1) - t
    hidden = (earlier < 0) | (earlier % cfg.dilation != 0)
    k, v = (x.repeat_interleave(q_BNHD.shape[2] // groups, 2) for x in (k_BNGD, v_BNGD))

    def score(queries: Tensor, keys: Tensor) -> Tensor:
        logits = torch.einsum("bnhd,bmhd->bhnm", queries, keys) / math.sqrt(WIDTH)
        rows = torch.einsum("bhnm,bmhd->bnhd", logits.masked_fill(hidden, -math.inf).softmax(-1), v)
        norms: Tensor = rows.unflatten(2, (groups, -1)).square().sum((3, 4)).sqrt()
        return norms.transpose(1, 2)

    return [score(q_BNHD, k), score(k, q_BNHD)]


def entries_with_padding_below_all(case: Case, zeroed: Sequence[Tensor], valid_len: int) -> list[list[list[int]]]:
    """The specification: padding scores less than any token, whatever a token's score, which may be 0."""
    cfg, (q, k, v) = case.cfg, zeroed
    token = torch.arange(case.seq_len) < valid_len
    query, key = (torch.where(token, 1 + score, 0) for score in scores(q, k, v, cfg))
    return oracle.select(
        query, key, cfg.num_levels, cfg.pooling_factor, cfg.topk, cfg.strata, cover_prefix=cfg.cover_prefix
    )


def assert_no_padding_before_a_token(row: list[int], case: Case, valid_len: int) -> None:
    """In a stratum, an entry of padding alone is selected only where every candidate with a token is."""
    cfg = case.cfg
    entries = {oracle.level_and_index(flat, case.seq_len, cfg.num_levels, cfg.pooling_factor) for flat in row}
    chosen_padding, passed_tokens = set(), set()
    for level, index in entries:
        if level == 0:
            continue
        window = cfg.pooling_factor**level
        place = (level, index * window // (case.seq_len // cfg.strata))
        selected = (level - 1, index * cfg.pooling_factor) in entries
        if selected and index * window >= valid_len:
            chosen_padding.add(place)
        if not selected and index * window < valid_len:
            passed_tokens.add(place)
    assert not chosen_padding & passed_tokens


def padded(case: Case, valid_len: int, value: float) -> list[Tensor]:
    """q, k and v with `value` in the padding."""
    position = torch.arange(case.seq_len).view(-1, 1, 1)
    return [x.masked_fill(position >= valid_len, value) for x in case.make()]


SMALL_CASES = cases(96, ANY_LAYOUT.filter(lambda layout: layout.num_chunks <= 8))
GARBAGE = st.sampled_from([math.nan, 1e300, math.inf, -1e300, -math.inf, 1.0])


def check_selection(case: Case, valid_len: int, garbage: float) -> None:
    expected = entries_with_padding_below_all(case, padded(case, valid_len, 0), valid_len)
    q, k, v = padded(case, valid_len, garbage)

    def selected(cp: ContextParallel) -> list[list[list[int]]]:
        q_, k_, v_ = (cp.shard(x) for x in (q, k, v))
        selection = select(q_, k_, case.cfg, v=v_, context_parallel=cp, valid_len=valid_len)
        entries: list[list[list[int]]] = cp.unshard(selection).entries.tolist()
        return entries

    for entries in on_every_rank(case.layout, selected, case.exchange):
        for row in (row for of_sequence in entries for row in of_sequence):
            assert_no_padding_before_a_token(row, case, valid_len)
        assert entries == expected


@settings(max_examples=80)
@given(SMALL_CASES, GARBAGE, st.data())
def test_padding_is_selected_last(case: Case, garbage: float, data: st.DataObject) -> None:
    if case.cfg.scorer == "dilated" and not math.isfinite(garbage):
        garbage = 1e300  # see the next test
    check_selection(case, data.draw(st.sampled_from(range(1, case.seq_len + 1))), garbage)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_padding_that_is_not_finite_is_selected_last_by_dilated(garbage: float) -> None:
    cfg = LighthouseConfig(num_levels=2, pooling_factor=2, topk=8, num_strata=1, scorer="dilated", dilation=2)
    check_selection(Case(cfg, 32, ChunkLayout(1, "zigzag"), "ring", 1, 1, 1, ties=False, seed=0), 22, garbage)


@settings(max_examples=30)
@given(SMALL_CASES, GARBAGE, st.data())
def test_padding_changes_nothing_for_tokens(case: Case, garbage: float, data: st.DataObject) -> None:
    """Whatever is in it, it counts as rows of zeros: the oracle's output and gradients, and none for the padding."""
    cfg, valid_len = case.cfg, data.draw(st.sampled_from(range(1, case.seq_len + 1)))
    zeroed, filled = padded(case, valid_len, 0), padded(case, valid_len, garbage)
    entries = entries_with_padding_below_all(case, zeroed, valid_len)
    weights = make_weights(zeroed[0])
    weights[:, valid_len:] = 0
    expected = out_and_grads(
        lambda q, k, v: oracle.attention(q, k, v, entries, cfg.num_levels, cfg.pooling_factor), zeroed, weights
    )

    def actual(cp: ContextParallel) -> list[Tensor]:
        return out_and_grads(
            lambda q, k, v: lighthouse_attention(q, k, v, cfg, context_parallel=cp, valid_len=valid_len),
            filled,
            weights,
            cp,
        )

    for result in on_every_rank(case.layout, actual, case.exchange):
        assert_close([x[:, :valid_len] for x in result], [x[:, :valid_len] for x in expected], 1e-12)
        for grad in result[1:]:
            assert not grad[:, valid_len:].any()
