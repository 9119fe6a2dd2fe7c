"""Which rank holds which tokens: pure integers, no processes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lhcp.config import ConfigError, Sharding
from lhcp.distributed import ContextParallel
from lhcp.distributed.exchange.ring import visible_block
from lhcp.distributed.sharding import ChunkLayout

LAYOUTS = st.builds(ChunkLayout, st.integers(1, 9), st.sampled_from(["zigzag", "contiguous"]))


def test_zigzag_of_four() -> None:
    layout = ChunkLayout(4, "zigzag")
    assert [layout.chunks(rank) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert layout.runs(1, 80) == [(10, 20), (60, 70)]


@pytest.mark.parametrize("sharding", ["zigzag", "contiguous"])
def test_one_rank_holds_one_chunk(sharding: Sharding) -> None:
    assert ChunkLayout(1, sharding).runs(0, 7) == [(0, 7)]


@given(LAYOUTS, st.integers(1, 5))
def test_every_token_has_one_owner(layout: ChunkLayout, chunk_length: int) -> None:
    length = layout.num_chunks * chunk_length
    tokens = [t for rank in range(layout.world) for run in layout.runs(rank, length) for t in range(*run)]
    assert sorted(tokens) == list(range(length))
    for chunk in range(layout.num_chunks):
        rank, place = layout.owner(chunk)
        assert layout.chunks(rank)[place] == chunk


@given(LAYOUTS, st.integers(1, 3))
def test_the_ring_visits_exactly_the_causal_triangle(layout: ChunkLayout, chunk_length: int) -> None:
    """Diagonal blocks are causal by local order; other blocks are full: together, every pair key <= query, once."""
    length = layout.num_chunks * chunk_length
    seen = torch.zeros(length, length, dtype=torch.int64)
    positions = [torch.cat([torch.arange(*run) for run in layout.runs(r, length)]) for r in range(layout.world)]
    for rank, own in enumerate(positions):
        seen[own.unsqueeze(1), own] += torch.ones(len(own), len(own), dtype=torch.int64).tril()
        for source in range(layout.world):
            if source == rank or (block := visible_block(layout, rank, source, len(own))) is None:
                continue
            seen[own[block.queries].unsqueeze(1), positions[source][block.keys]] += 1
    assert torch.equal(seen, torch.ones(length, length, dtype=torch.int64).tril())


@given(st.integers(2, 9))
def test_zigzag_balances_the_causal_work(world: int) -> None:
    layout, length = ChunkLayout(world, "zigzag"), 64
    work = set()
    for rank in range(world):
        pairs = 0
        for source in range(world):
            block = None if source == rank else visible_block(layout, rank, source, length)
            if block is not None:
                pairs += (block.queries.stop - block.queries.start) * (block.keys.stop - block.keys.start)
        work.add(pairs)
    assert len(work) == 1


def test_lengths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"length 90 does not divide into the 8 chunks .* multiple of 8"):
        ChunkLayout(4, "zigzag").chunk_length(90)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="valid are 'zigzag', 'contiguous'"):
        ContextParallel(None, sharding="striped")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"valid are .*'ring', 'allgather', 'ulysses'"):
        ContextParallel(None, exchange="tree")  # type: ignore[arg-type]


def test_one_process_shards_nothing() -> None:
    cp = ContextParallel()
    x = torch.randn(2, 6, 3)
    assert cp.shard(x) is x
    assert cp.unshard(x) is x
    assert cp.positions(6).tolist() == [0, 1, 2, 3, 4, 5]


def test_shapes_that_do_not_fit_are_refused() -> None:
    q = torch.randn(1, 8, 4, 2)
    for k, v in [(q[:, :4], q[:, :4]), (q, q[:, :, :2]), (q[:, :, :3], q[:, :, :3])]:
        with pytest.raises(ConfigError, match="G dividing H, in one dtype"):
            ContextParallel().attend(q, k, v)
