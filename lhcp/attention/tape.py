"""Selections that a recomputed forward pass uses again, instead of selecting anew.

Under activation checkpointing a layer runs twice. Selecting twice would cost time and, where rounding differs
between the two runs, could choose other entries: gradients of something that was never computed.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager

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

    def rewind(self) -> None:
        """Begin to replay, from the first selection on."""
        self._replayed = 0


class _Active(threading.local):
    """The tape in use on this thread: backward passes have threads of their own."""

    tape: SelectionTape | None = None


_active = _Active()


class _Use(AbstractContextManager[None]):
    """`tape` in use on this thread. Entered anew at every backward pass of a graph that is kept."""

    def __init__(self, tape: SelectionTape, *, replay: bool) -> None:
        self._tape, self._replay = tape, replay
        self._before: list[SelectionTape | None] = []

    def __enter__(self) -> None:
        if self._replay:
            self._tape.rewind()
        self._before.append(_active.tape)
        _active.tape = self._tape

    def __exit__(self, *error: object) -> None:
        _active.tape = self._before.pop()


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of `torch.utils.checkpoint.checkpoint`: a new tape, recording and replaying."""
    tape = SelectionTape()
    return _Use(tape, replay=False), _Use(tape, replay=True)


def recorded() -> Selection | None:
    """What the forward pass selected here, in a recomputation; else None."""
    return None if _active.tape is None else _active.tape.next()


def record(selection: Selection) -> Selection:
    """`selection`, kept for the recomputation if there will be one."""
    if _active.tape is not None:
        _active.tape.record(selection)
    return selection
