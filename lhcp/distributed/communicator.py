"""What ranks of a context-parallel group say to each other: four operations, and all their transfers go through them.

Another implementation of `Communicator` makes other ranks: threads of one process (`threads`), or, for a benchmark, one
rank without the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lhcp.distributed.link import Link, Transfer

# Named so since torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Communicator(Protocol):
    """One rank among `size`. Every rank calls the same operations in the same order, collectives on tensors of one
    shape."""

    @property
    def rank(self) -> int:
        """Of this process, or thread, in [0, size)."""

    @property
    def size(self) -> int:
        """The context-parallel degree W."""

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's `x`: [W, ...]."""

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """The sum over ranks of their `x[rank]`, of this one's rank: [W, ...] -> [...], in x's dtype."""

    def all_to_all(self, x: Tensor) -> Tensor:
        """Rank r's `x[rank]` at place r: [W, ...] -> [W, ...]."""

    def link(self) -> Link:
        """A new link to the other ranks."""


class GroupCommunicator:
    """The ranks of a process group, gloo and NCCL alike."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Communicator.all_gather`."""
        out = x.new_empty(self.size, *x.shape)
        _all_gather(out.flatten(0, 1), x.contiguous(), group=self._group)
        return out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See `Communicator.reduce_scatter`. (gloo's is an all-reduce, of twice the bytes.)"""
        out = x.new_empty(x.shape[1:])
        _reduce_scatter(out, x.flatten(0, 1), group=self._group)
        return out

    def all_to_all(self, x: Tensor) -> Tensor:
        """See `Communicator.all_to_all`."""
        x = x.contiguous()
        out = x.new_empty(x.shape)
        dist.all_to_all_single(out, x, group=self._group)
        return out

    def link(self) -> Link:
        """See `Communicator.link`."""
        return Link(self._start)

    def _start(self, transfers: Sequence[Transfer]) -> Callable[[], None]:
        """Start all; what is returned waits for them, on a GPU by making the current stream wait."""
        ops = []
        for transfer in transfers:
            if transfer.receive is not None:
                ops.append(dist.P2POp(dist.irecv, transfer.receive, self._global_rank(-transfer.places), self._group))
            if transfer.send is not None:
                ops.append(dist.P2POp(dist.isend, transfer.send, self._global_rank(transfer.places), self._group))
        works = dist.batch_isend_irecv(ops) if ops else []
        if ops and ops[0].tensor.is_cuda:
            _detour(ops[0].tensor.device)

        def finish() -> None:
            for work in works:
                work.wait()

        return finish

    def _global_rank(self, places: int) -> int:
        return dist.get_global_rank(self._group, (self.rank + places) % self.size)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _detour(device: torch.device) -> None:
    """Hold what follows on the current stream back for some microseconds, so that NCCL's kernel can start first.

    An attention kernel takes every multiprocessor until its last tiles. Launched first, by however little, it would
    keep the transfer that it should hide waiting, and most of it would come after.
    """
    here, elsewhere = torch.cuda.current_stream(device), _stream(device)
    elsewhere.wait_stream(here)
    here.wait_stream(elsewhere)
