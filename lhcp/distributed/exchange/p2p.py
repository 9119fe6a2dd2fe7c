"""Neighbour exchange round a ring of ranks, gloo and NCCL alike."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class RingLink:
    """Sends to the next rank while receiving from the previous one; one transfer at a time.

    `post` starts a transfer and `wait` ends it; compute between the two overlaps. Every rank must post the
    same sequence of transfers: messages carry no tag.
    """

    def __init__(self, group: ProcessGroup) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        self._group = group
        self._next = dist.get_global_rank(group, (rank + 1) % size)
        self._previous = dist.get_global_rank(group, (rank - 1) % size)
        self._pending: list[dist.Work] | None = None

    def post(self, send: Tensor, receive: Tensor) -> None:
        """Start sending `send` and receiving into `receive`; both contiguous and untouched until `wait`.

        Raises:
            RuntimeError: a transfer is under way, or the buffers cannot be exchanged.
        """
        if self._pending is not None:
            raise RuntimeError("RingLink.post: a transfer is under way; call wait first")
        if not (send.is_contiguous() and receive.is_contiguous()):
            raise RuntimeError("RingLink.post: buffers must be contiguous")
        if send.shape != receive.shape or send.dtype != receive.dtype:
            raise RuntimeError(
                f"RingLink.post: sends {send.dtype} {tuple(send.shape)}, receives {receive.dtype} "
                f"{tuple(receive.shape)}; ranks must hold shards of one shape"
            )
        if send.data_ptr() == receive.data_ptr():
            raise RuntimeError("RingLink.post: send and receive are one buffer")
        self._pending = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.irecv, receive, self._previous, self._group),
                dist.P2POp(dist.isend, send, self._next, self._group),
            ]
        )

    def wait(self) -> None:
        """End the transfer: the received buffer may be read, the sent one overwritten.

        Raises:
            RuntimeError: no transfer is under way.
        """
        if self._pending is None:
            raise RuntimeError("RingLink.wait: no transfer is under way; call post first")
        for work in self._pending:
            work.wait()
        self._pending = None
