"""Neighbour exchange round a ring of ranks."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Start = Callable[[Tensor, Tensor], Callable[[], None]]
"""Starts to send the first tensor and to receive into the second; what it returns waits until both are done."""


class RingLink:
    """Sends to the next rank while receiving from the previous one; one transfer at a time.

    `post` starts a transfer and `wait` ends it; compute between the two overlaps. Every rank must post the
    same sequence of transfers: messages carry no tag.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._finish: Callable[[], None] | None = None

    def post(self, send: Tensor, receive: Tensor) -> None:
        """Start sending `send` and receiving into `receive`; both contiguous and untouched until `wait`.

        Raises:
            RuntimeError: a transfer is under way, or the buffers cannot be exchanged.
        """
        if self._finish is not None:
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
        self._finish = self._start(send, receive)

    def wait(self) -> None:
        """End the transfer: the received buffer may be read, the sent one overwritten.

        Raises:
            RuntimeError: no transfer is under way.
        """
        if self._finish is None:
            raise RuntimeError("RingLink.wait: no transfer is under way; call post first")
        finish, self._finish = self._finish, None
        finish()
