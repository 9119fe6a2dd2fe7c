"""Selections that a recomputed forward pass uses again, instead of selecting anew.

Under activation checkpointing a layer runs twice. Selecting twice would cost time and, where rounding differs
between the two runs, could choose other entries: gradients of something that was never computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import replace

from lhcp.attention.selection import Selection


class SelectionTape:
    """The selections of one checkpointed region, in the order of its forward pass."""

    def __init__(self) -> None:
        self._selections: list[Selection] = []
        self._replayed: int | None = None

    def record(self, selection: Selection) -> None:
        """Keep a selection of the forward pass."""
        # A copy without what `selection` derives and caches from its entries: those alone are kept for backward.
        self._selections.append(replace(selection))

    def next(self) -> Selection | None:
        """The next kept selection, in the recomputation; None in the forward pass."""
        if self._replayed is None:
            return None
        self._replayed += 1
        return self._selections[self._replayed - 1]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Around the forward pass."""
        with _active(self):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Around the recomputation."""
        self._replayed = 0
        with _active(self):
            yield


_tape: ContextVar[SelectionTape | None] = ContextVar("_tape", default=None)


@contextmanager
def _active(tape: SelectionTape) -> Iterator[None]:
    token = _tape.set(tape)
    try:
        yield
    finally:
        _tape.reset(token)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of `torch.utils.checkpoint.checkpoint`: a new tape, recording and replaying."""
    tape = SelectionTape()
    return tape.recording(), tape.replaying()


def recorded() -> Selection | None:
    """What the forward pass selected here, in a recomputation; else None."""
    tape = _tape.get()
    return None if tape is None else tape.next()


def record(selection: Selection) -> Selection:
    """`selection`, kept for the recomputation if there will be one."""
    tape = _tape.get()
    if tape is not None:
        tape.record(selection)
    return selection
