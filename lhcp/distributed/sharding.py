"""Which rank holds which tokens: pure integer functions, tested without processes.

A sequence is cut into equal runs of consecutive tokens, the chunks. `contiguous`: chunk r on rank r of W.
`zigzag`: 2W chunks, r and 2W-1-r on rank r, so that every rank has the same share of a causal triangle.
One process holds one chunk under either.
"""

from __future__ import annotations

from dataclasses import dataclass

from lhcp.config import ConfigError, Sharding


@dataclass(frozen=True)
class ChunkLayout:
    """The chunks of W = `world` ranks."""

    world: int
    sharding: Sharding

    @property
    def chunks_per_rank(self) -> int:
        """1, or 2 under zigzag."""
        return 2 if self.sharding == "zigzag" and self.world > 1 else 1

    @property
    def num_chunks(self) -> int:
        """Chunks of a whole sequence."""
        return self.world * self.chunks_per_rank

    def chunks(self, rank: int) -> tuple[int, ...]:
        """The chunks of `rank`, ascending: the order in which it holds them."""
        assert 0 <= rank < self.world
        return (rank,) if self.chunks_per_rank == 1 else (rank, self.num_chunks - 1 - rank)

    def owner(self, chunk: int) -> tuple[int, int]:
        """(rank, place among that rank's chunks) of `chunk`."""
        assert 0 <= chunk < self.num_chunks
        return (chunk, 0) if chunk < self.world else (self.num_chunks - 1 - chunk, 1)

    def chunk_length(self, length: int) -> int:
        """Elements of one chunk when `length` are sharded.

        Raises:
            ConfigError: when they do not divide evenly.
        """
        if length % self.num_chunks:
            raise ConfigError(
                f"length {length} does not divide into the {self.num_chunks} chunks of context-parallel degree "
                f"{self.world} ({self.sharding}); use a multiple of {self.num_chunks}"
            )
        return length // self.num_chunks

    def runs(self, rank: int, length: int) -> list[tuple[int, int]]:
        """The half-open runs [start, stop) of `length` elements that `rank` holds, ascending."""
        size = self.chunk_length(length)
        return [(chunk * size, (chunk + 1) * size) for chunk in self.chunks(rank)]
