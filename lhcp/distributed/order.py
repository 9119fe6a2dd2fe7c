"""Every rank's shard in the order of the sequence, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from lhcp.distributed.sharding import ChunkLayout


def joined(shards: Tensor, dim: int, layout: ChunkLayout) -> Tensor:
    """The whole of what `shards` [W, ...] are the shards of, by rank; `dim` is the sequence, of a shard."""
    dim %= shards.dim() - 1
    chunks = shards
    if layout.chunks_per_rank == 2:
        first, second = shards.chunk(2, dim + 1)
        chunks = torch.cat((first, second.flip(0)))
    return chunks.movedim(0, dim).flatten(dim, dim + 1)


def parted(x: Tensor, dim: int, layout: ChunkLayout) -> Tensor:
    """The shards of `x`, by rank: [W, ...]; `dim` is the sequence. The inverse of `joined`."""
    dim %= x.dim()
    chunks: Tensor = x.unflatten(dim, (layout.num_chunks, -1)).movedim(dim, 0)
    if layout.chunks_per_rank == 1:
        return chunks
    first, second = chunks.chunk(2)
    return torch.cat((first, second.flip(0)), dim + 1)
