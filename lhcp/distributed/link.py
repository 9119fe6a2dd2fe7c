"""Neighbour exchange round a ring of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Transfer = tuple[Tensor, Tensor]
"""What is sent to the next rank, and where what the previous one sends is received."""
Start = Callable[[Sequence[Transfer]], Callable[[], None]]
"""Starts transfers, all together; what it returns waits until all are done."""


class RingLink:
    """Sends to the next rank while receiving from the previous one.

    `post` starts transfers and `wait` ends them; compute between the two overlaps. Every rank must post the
    same sequence of transfers: messages carry no tag.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._finish: Callable[[], None] | None = None

    def post(self, *transfers: Transfer) -> None:
        """Start sending and receiving, all together; buffers must be contiguous, and are left alone until `wait`.

        Args:
            transfers: of each, what is sent and where is received.

        Raises:
            RuntimeError: a transfer is under way, or the buffers cannot be exchanged.
        """
        if self._finish is not None:
            raise RuntimeError("RingLink.post: a transfer is under way; call wait first")
        for send, receive in transfers:
            _check_buffers(send, receive)
        self._finish = self._start(transfers)

    def wait(self) -> None:
        """End the transfers: received buffers may be read, those sent overwritten.

        Raises:
            RuntimeError: no transfer is under way.
        """
        if self._finish is None:
            raise RuntimeError("RingLink.wait: no transfer is under way; call post first")
        finish, self._finish = self._finish, None
        finish()


def _check_buffers(send: Tensor, receive: Tensor) -> None:
    if not (send.is_contiguous() and receive.is_contiguous()):
        raise RuntimeError("RingLink.post: buffers must be contiguous")
    if send.shape != receive.shape or send.dtype != receive.dtype:
        raise RuntimeError(
            f"RingLink.post: sends {send.dtype} {tuple(send.shape)}, receives {receive.dtype} "
            f"{tuple(receive.shape)}; ranks must hold shards of one shape"
        )
    if send.data_ptr() == receive.data_ptr():
        raise RuntimeError("RingLink.post: send and receive are one buffer")
