"""The halo: what a chunk's last pyramid entries write into the next chunk.

One small all-gather serves every layout (under zigzag a chunk's successor is on the next rank, on the one
before, or on the rank itself), and it is one autograd node that every rank has in its graph: a rank without
it would never join the others' backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lhcp.distributed.collectives import all_gather
from lhcp.distributed.sharding import ChunkLayout


def exchange_halo(rows: Tensor, layout: ChunkLayout, rank: int, group: ProcessGroup | None) -> Tensor:
    """For each chunk of `rank`, the `rows` [chunks of the rank, ...] of the chunk before it, or zeros."""
    if layout.world == 1:
        return torch.zeros_like(rows)
    out: Tensor = _Halo.apply(rows, layout, rank, group)  # type: ignore[no-untyped-call]
    return out


def _neighbours(rows: Tensor, offset: int, layout: ChunkLayout, rank: int, group: ProcessGroup) -> Tensor:
    """The rows of chunk c + offset for each chunk c of `rank`; zeros past either end."""
    everyone = all_gather(rows, group)
    taken = []
    for chunk in layout.chunks(rank):
        if 0 <= chunk + offset < layout.num_chunks:
            owner, place = layout.owner(chunk + offset)
            taken.append(everyone[owner][place])
        else:
            taken.append(torch.zeros_like(rows[0]))
    return torch.stack(taken)


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: ChunkLayout, rank: int, group: ProcessGroup) -> Tensor:
        ctx.place = (layout, rank, group)
        return _neighbours(rows, -1, *ctx.place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _neighbours(grad, +1, *ctx.place), None, None, None
