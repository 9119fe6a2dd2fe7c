"""Transfers between ranks of a group that run beside compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Transfer:
    """Every rank sends to the one so many places on, and receives from the one as many places back, round the group."""

    places: int
    """On; negative: back."""
    send: Tensor | None
    """None: nothing."""
    receive: Tensor | None
    """Where to; None: nothing comes."""


Start = Callable[[Sequence[Transfer]], Callable[[], None]]
"""Starts transfers, all together; what it returns waits until all are done."""


class Link:
    """This rank's way to the others and theirs to it.

    `post` starts transfers and `wait` ends them; compute between the two overlaps. Every rank must post the
    same sequence of transfers, of sizes that agree: messages carry no tag.
    """

    def __init__(self, start: Start) -> None:
        self._start = start
        self._finish: Callable[[], None] | None = None

    def post(self, *transfers: Transfer) -> None:
        """Start all, together; buffers must be contiguous, and are left alone until `wait`.

        Raises:
            RuntimeError: transfers are under way, or the buffers cannot be exchanged.
        """
        if self._finish is not None:
            raise RuntimeError("Link.post: a transfer is under way; call wait first")
        for transfer in transfers:
            _check_buffers(transfer.send, transfer.receive)
        self._finish = self._start(transfers)

    def wait(self) -> None:
        """End them: received buffers may be read, those sent overwritten.

        Raises:
            RuntimeError: no transfer is under way.
        """
        if self._finish is None:
            raise RuntimeError("Link.wait: no transfer is under way; call post first")
        finish, self._finish = self._finish, None
        finish()


def _check_buffers(send: Tensor | None, receive: Tensor | None) -> None:
    if not all(buffer is None or buffer.is_contiguous() for buffer in (send, receive)):
        raise RuntimeError("Link.post: buffers must be contiguous")
    if send is None or receive is None:
        return
    if send.dtype != receive.dtype:
        raise RuntimeError(f"Link.post: sends {send.dtype}, receives {receive.dtype}; ranks must hold one dtype")
    if send.numel() and send.data_ptr() == receive.data_ptr():
        raise RuntimeError("Link.post: send and receive are one buffer")
