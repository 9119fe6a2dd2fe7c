"""Ending a run in order when it is told to: SIGTERM and SIGUSR1 are noted, and the trainer asks at each step.

A rank that hangs never asks. So a thread of its own counts down from the first signal, writes where every thread of
the process is, and ends it.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

EXIT_STOPPED = 75
"""Exit code of a run that was told to stop and has saved: start it again to go on (EX_TEMPFAIL of sysexits.h)."""
EXIT_FORCED = 76
"""Exit code of a rank that had not saved when its time was up."""
EXIT_HUNG = 77
"""Exit code of the ranks of a run that has made no progress for `hang_timeout_s`; see `lhcp.watchdog`."""
EXIT_REFUSED = 2
"""Exit code of what the user can correct, such as a wrong value: starting again would not help."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was told to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first signal."""


@contextmanager
def stop_on_signal(timeout_s: float, compiles: bool = False) -> Iterator[StopRequest]:
    """Note `SIGNALS` while the body runs, and exit with `EXIT_FORCED` when it goes on `timeout_s` seconds after one.

    Must be entered in the main thread. The stacks of all threads are written to stderr before that exit.

    Args:
        timeout_s: for the body to end.
        compiles: whether Triton may compile in the body, which would lose SIGUSR1. Takes half a second.
    """
    request = StopRequest()
    receiving, sending = os.pipe()
    os.set_blocking(sending, False)
    left = threading.Event()

    def watch() -> None:
        # The interpreter's C handler writes the number of the signal, even while the main thread hangs in C.
        number = os.read(receiving, 1)
        while number and number[0] not in SIGNALS:  # such as Ctrl-C
            number = os.read(receiving, 1)
        if not number:
            return
        request.signal = signal.Signals(number[0])
        if not left.wait(timeout_s):
            print(
                f"error: still busy {timeout_s:g} s after {request.signal.name}; forced to exit, nothing was saved",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback()
            os._exit(EXIT_FORCED)

    previous = {number: signal.getsignal(number) for number in SIGNALS}
    previous_fd = signal.set_wakeup_fd(sending, warn_on_full_buffer=False)
    watcher = threading.Thread(target=watch, name="stop", daemon=True)
    # Until handlers are in their place signals wait, for all threads that start from here.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    watcher.start()
    try:
        try:
            _install(compiles)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield request
    finally:
        left.set()
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(sending)
        watcher.join()
        os.close(receiving)


def _install(compiles: bool) -> None:
    """The handlers of `SIGNALS`, for good.

    LLVM installs its own, of these and more, when it runs in a process for the first time; its SIGUSR1 does nothing.
    When it gets one of the others it puts back what was there when it came, so Python's must be there by then.
    """
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    if compiles:
        with suppress(Exception):  # where Triton cannot compile there is no LLVM
            _compile_nothing()
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)


def _compile_nothing() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def nothing() -> None:
        pass

    # Not in a cache that may have it already, which needs no LLVM.
    with tempfile.TemporaryDirectory(prefix="lhcp-") as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        triton.compile(ASTSource(triton.jit(nothing), {}, {}), target=GPUTarget("cuda", 80, 32))
