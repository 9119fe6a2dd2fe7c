"""Ranks that are threads of one process and share its device: to see on one GPU, or quickly, what many compute.

They take turns: on a GPU everything runs on one stream, and a transfer is a copy. Nothing here is fast.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lhcp.distributed.link import Link, Transfer

T = TypeVar("T")
TIMEOUT_S = 300.0
"""How long a rank waits for another."""


class _Meeting:
    """Where the threads of a group hand tensors to each other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=TIMEOUT_S)
        self.slots: list[Tensor | None] = [None] * size


class ThreadCommunicator:
    """See `lhcp.distributed.communicator.Communicator`."""

    def __init__(self, meeting: _Meeting, rank: int) -> None:
        self._meeting = meeting
        self.rank, self.size = rank, meeting.size

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Communicator.all_gather`."""
        return self._with_all(x, torch.stack)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See `Communicator.reduce_scatter`."""
        return self._with_all(x, lambda everyone: torch.stack([theirs[self.rank] for theirs in everyone]).sum(0))

    def all_to_all(self, x: Tensor) -> Tensor:
        """See `Communicator.all_to_all`."""
        return self._with_all(x, lambda everyone: torch.stack([theirs[self.rank] for theirs in everyone]))

    def link(self) -> Link:
        """See `Communicator.link`."""
        return Link(self._start)

    def _start(self, transfers: Sequence[Transfer]) -> Callable[[], None]:
        for transfer in transfers:
            self._with_all(torch.empty(0) if transfer.send is None else transfer.send, partial(self._take, transfer))
        return lambda: None

    def _take(self, transfer: Transfer, everyone: list[Tensor]) -> None:
        if transfer.receive is not None:
            transfer.receive.copy_(everyone[(self.rank - transfer.places) % self.size])

    def _with_all(self, x: Tensor, take: Callable[[list[Tensor]], T]) -> T:
        """What `take` makes of every rank's `x`, which none changes before all have taken."""
        meeting = self._meeting
        meeting.slots[self.rank] = x
        meeting.barrier.wait()
        taken = take([slot for slot in meeting.slots if slot is not None])
        meeting.barrier.wait()
        return taken


def run_threads(world: int, function: Callable[[ThreadCommunicator], T]) -> Sequence[T]:
    """Call `function` in `world` threads, each a rank; what they return, by rank.

    Raises:
        Exception: the first that a rank raised.
    """
    meeting, results, errors = _Meeting(world), dict[int, T](), list[BaseException]()

    def run(rank: int) -> None:
        # A backward pass that waits for other ranks must run in their threads, not all in the one of the device.
        with torch.autograd.set_multithreading_enabled(False):
            try:
                results[rank] = function(ThreadCommunicator(meeting, rank))
            except BaseException as error:  # raised again below
                errors.append(error)
                meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return [results[rank] for rank in range(world)]
