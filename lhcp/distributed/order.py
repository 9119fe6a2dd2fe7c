"""Every rank's shard in the order of the sequence, and back: one copy each."""

from __future__ import annotations

import torch
from torch import Tensor

from lhcp.distributed.sharding import ChunkLayout


def joined(shards: Tensor, dim: int, layout: ChunkLayout) -> Tensor:
    """The whole of what `shards` [W, ...] are the shards of, by rank; `dim` is the sequence, of a shard."""
    dim %= shards.dim() - 1
    size = shards.shape[dim + 1] // layout.chunks_per_rank
    owners = [layout.owner(chunk) for chunk in range(layout.num_chunks)]
    return torch.cat([shards[rank].narrow(dim, place * size, size) for rank, place in owners], dim)


def parted(x: Tensor, dim: int, layout: ChunkLayout) -> Tensor:
    """The shards of `x`, by rank: [W, ...]; `dim` is the sequence. The inverse of `joined`."""
    dim %= x.dim()
    size = x.shape[dim] // layout.num_chunks
    chunks = [x.narrow(dim, chunk * size, size) for rank in range(layout.world) for chunk in layout.chunks(rank)]
    by_place: Tensor = torch.stack(chunks).unflatten(0, (layout.world, layout.chunks_per_rank))
    return by_place.movedim(1, dim + 1).flatten(dim + 1, dim + 2)
