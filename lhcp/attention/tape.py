"""Selections that a recomputed forward pass uses again, instead of selecting anew.

Under activation checkpointing a layer runs twice. Selecting twice would cost time and, where rounding differs
between the two runs, could choose other entries: gradients of something that was never computed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from lhcp.attention.selection import Selection


class SelectionTape:
    """The selections of one checkpointed region, in the order of its forward pass."""

    def __init__(self) -> None:
        self._selections: list[Selection] = []
        self._replayed: int | None = None

    def record(self, selection: Selection) -> None:
        """Keep a selection of the forward pass."""
        self._selections.append(selection)

    def next(self) -> Selection | None:
        """The next kept selection, in the recomputation; None in the forward pass."""
        if self._replayed is None:
            return None
        self._replayed += 1
        return self._selections[self._replayed - 1]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the forward pass."""
        with _use(self):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Around the recomputation."""
        self._replayed = 0
        with _use(self):
            yield


class _Active(threading.local):
    """The tape in use on this thread: backward passes have threads of their own."""

    tape: SelectionTape | None = None


_active = _Active()


@contextmanager
def _use(tape: SelectionTape) -> Iterator[None]:
    before, _active.tape = _active.tape, tape
    try:
        yield
    finally:
        _active.tape = before


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of `torch.utils.checkpoint.checkpoint`: a new tape, recording and replaying."""
    tape = SelectionTape()
    return tape.recording(), tape.replaying()


def recorded() -> Selection | None:
    """What the forward pass selected here, in a recomputation; else None."""
    return None if _active.tape is None else _active.tape.next()


def record(selection: Selection) -> Selection:
    """`selection`, kept for the recomputation if there will be one."""
    if _active.tape is not None:
        _active.tape.record(selection)
    return selection
