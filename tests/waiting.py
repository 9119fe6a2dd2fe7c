"""Waiting for what another process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(reached: Callable[[], bool], timeout: float, report: Callable[[], str], every: float = 0.1) -> None:
    """Ask `every` so many seconds, until it is so.

    Raises:
        AssertionError: it has not come to it within `timeout` seconds; with what `report` says.
    """
    deadline = time.monotonic() + timeout
    while not reached():
        assert time.monotonic() < deadline, f"not within {timeout} s: {report()}"
        time.sleep(every)
