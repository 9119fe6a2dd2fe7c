"""The halo: what a chunk's last pyramid entries write into the next chunk.

One small all-gather serves every layout (under zigzag a chunk's successor is on the next rank, on the one
before, or on the rank itself), and it is one node that every rank has in its graph: a rank without it would
never join the others' backward. Opaque to torch.compile: a contiguous last rank takes nothing from backward's
all-gather, which a compiler that saw it would move to another place than the other ranks' compilers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lhcp.distributed.communicator import Communicator
from lhcp.distributed.exchange.ops import named, register
from lhcp.distributed.sharding import ChunkLayout


class Halo:
    """The exchange of rows between neighbouring chunks, as a torch op with a gradient."""

    def __init__(self, layout: ChunkLayout, communicator: Communicator) -> None:
        self._layout, self._communicator = layout, communicator
        self.name = register(self)

    def __call__(self, rows: Tensor) -> Tensor:
        """For each chunk of this rank, the `rows` [chunks of the rank, ...] of the chunk before it, or zeros."""
        out: Tensor = torch.ops.lhcp.halo(rows, self.name)
        return out

    def neighbours(self, rows: Tensor, offset: int) -> Tensor:
        """The rows of chunk c + offset for each chunk c of this rank; zeros past either end (collective)."""
        everyone = self._communicator.all_gather(rows)
        taken = []
        for chunk in self._layout.chunks(self._communicator.rank):
            if 0 <= chunk + offset < self._layout.num_chunks:
                owner, place = self._layout.owner(chunk + offset)
                taken.append(everyone[owner][place])
            else:
                taken.append(torch.zeros_like(rows[0]))
        return torch.stack(taken)


_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define("lhcp::halo", "(Tensor rows, str halo) -> Tensor", tags=_TAGS)
torch.library.define("lhcp::halo_backward", "(Tensor grad, str halo) -> Tensor", tags=_TAGS)


@torch.library.impl("lhcp::halo", "default")
def _halo(rows: Tensor, halo: str) -> Tensor:
    return named(halo, Halo).neighbours(rows, -1)


@torch.library.impl("lhcp::halo_backward", "default")
def _halo_backward(grad: Tensor, halo: str) -> Tensor:
    return named(halo, Halo).neighbours(grad, +1)


def _shape(rows: Tensor, halo: str) -> Tensor:
    return rows.new_empty(rows.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    _, ctx.halo = inputs
    ctx.alive = named(ctx.halo, Halo)  # until backward, also where nobody else keeps it


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.lhcp.halo_backward(grad, ctx.halo), None


torch.library.register_fake("lhcp::halo", _shape)
torch.library.register_fake("lhcp::halo_backward", _shape)
torch.library.register_autograd("lhcp::halo", _gradient, setup_context=_keep)
