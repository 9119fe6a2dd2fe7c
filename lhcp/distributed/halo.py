"""The halo: what a chunk's last pyramid entries write into the next chunk.

One small all-gather serves every layout (under zigzag a chunk's successor is on the next rank, on the one
before, or on the rank itself), and it is one autograd node that every rank has in its graph: a rank without
it would never join the others' backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lhcp.distributed.communicator import Communicator
from lhcp.distributed.sharding import ChunkLayout


def exchange_halo(rows: Tensor, layout: ChunkLayout, communicator: Communicator) -> Tensor:
    """For each chunk of this rank, the `rows` [chunks of the rank, ...] of the chunk before it, or zeros."""
    out: Tensor = _Halo.apply(rows, layout, communicator)  # type: ignore[no-untyped-call]
    return out


def _neighbours(rows: Tensor, offset: int, layout: ChunkLayout, communicator: Communicator) -> Tensor:
    """The rows of chunk c + offset for each chunk c of this rank; zeros past either end."""
    everyone = communicator.all_gather(rows)
    taken = []
    for chunk in layout.chunks(communicator.rank):
        if 0 <= chunk + offset < layout.num_chunks:
            owner, place = layout.owner(chunk + offset)
            taken.append(everyone[owner][place])
        else:
            taken.append(torch.zeros_like(rows[0]))
    return torch.stack(taken)


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: ChunkLayout, communicator: Communicator) -> Tensor:
        ctx.place = (layout, communicator)
        return _neighbours(rows, -1, *ctx.place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _neighbours(grad, +1, *ctx.place), None, None
