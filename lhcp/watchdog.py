"""A hang becomes an error: a rank that has not come forward for `hang_timeout_s` makes all ranks say where they are.

Each writes `logs/hang-rank-NNNNN.txt` with the stacks of its threads, and what it knows of its last collectives; one
tells which rank holds up the others, and all exit with `EXIT_HUNG`. None of this needs the thread that trains, and none
of it waits for a store or a file system that hangs, too, for long. Where no Python can run, timers of the C library
and of the kernel do what is left to do.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import torch.distributed as dist
from torch._C import _distributed_c10d

from lhcp.distributed.env import ProcessEnv
from lhcp.environment import now
from lhcp.roll_call import WINDOW, RollCall, Sign, alone
from lhcp.run_folder import LOG_FOLDER
from lhcp.stop import EXIT_HUNG

_WRITE_LIMIT_S = 5.0
_GRACE = 2
"""Ticks for the others to write the same; the end of one breaks their connections, which may end them."""


def collective_timeout(hang_timeout_s: float) -> timedelta:
    """Limit for one collective, so that the watchdog, which knows more, comes first."""
    return timedelta(seconds=hang_timeout_s + 60)


@contextmanager
def watch(run_dir: Path, env: ProcessEnv, timeout_s: float) -> Iterator[Watchdog]:
    """Watch over this process while the body runs. Must be entered in the main thread."""
    watchdog = Watchdog(run_dir, env, timeout_s)
    try:
        yield watchdog
    finally:
        watchdog.close()


class Watchdog:
    """Ends this process with `EXIT_HUNG` when `beat` is not called for `timeout_s` seconds.

    Args:
        run_dir: the run folder, made if it comes to a hang before there is one.
        env: of this rank.
        timeout_s: see `hang_timeout_s` of the configuration.
    """

    def __init__(self, run_dir: Path, env: ProcessEnv, timeout_s: float) -> None:
        self._env, self._timeout_s = env, timeout_s
        self._logs = run_dir / LOG_FOLDER
        self._file = self._logs / f"hang-rank-{env.rank:05d}.txt"
        self._tick_s = min(1.0, timeout_s / 10)
        self._last = (0, "at the start", time.monotonic(), time.time())
        self._fallback: TextIO = sys.stderr
        self._closed, self._lock = threading.Event(), threading.Lock()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self._arm(timeout_s)
        self._roll = RollCall(env, self._tick_s, self._sign)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, doing: str) -> None:
        """The rank has come forward and goes on with what `doing` says: `in step 58`.

        Every rank must call this at the same boundaries: who has passed fewer is behind.
        """
        self._last = (self._last[0] + 1, doing, time.monotonic(), time.time())

    def fall_back_to(self, log: Path) -> None:
        """Where the stacks go when this process cannot run Python: the end of its log."""
        with self._lock:
            self._fallback = log.open("a", encoding="utf-8")
            self._arm(self._timeout_s)

    def close(self) -> None:
        """Watch no more."""
        with self._lock:
            self._closed.set()
        # If it is ending this process, this does not return: what breaks here when other ranks end is not the cause.
        self._thread.join()
        self._roll.close()
        self._disarm()

    def _sign(self, tick: int) -> Sign:
        beats, doing, _, since = self._last
        return Sign(tick, _clock(time.time()), platform.node(), beats, doing, _clock(since))

    def _watch(self) -> None:
        while not self._closed.wait(self._tick_s):
            self._arm(self._timeout_s)
            if time.monotonic() - self._last[2] > self._timeout_s:
                self._roll.hung.set()
            if self._roll.hung.is_set():
                with self._lock:
                    if not self._closed.is_set():
                        self._end()

    def _arm(self, seconds: float) -> None:
        """Unless this is called again: write stacks when others, who see the hang first, have; end after them.

        Two timers that need neither Python nor each other, since writing may hang as well.
        """
        faulthandler.dump_traceback_later(seconds + (WINDOW + 1) * self._tick_s, file=self._fallback)
        signal.setitimer(signal.ITIMER_REAL, seconds + 3 * WINDOW * self._tick_s + 2)

    def _disarm(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        if self._fallback is not sys.stderr:
            self._fallback.close()

    def _end(self) -> None:
        try:
            self._arm(4 * _WRITE_LIMIT_S)
            backend = dist.get_backend() if dist.is_initialized() else None
            failure = _within(_WRITE_LIMIT_S, self._write_stacks)
            found = self._find()
            if failure:
                faulthandler.dump_traceback()
            if self._roll.speaks or self._roll.verdict is None:
                self._tell(found, failure)
            _within(_WRITE_LIMIT_S, lambda: self._append(f"\n{found}\n"))
            if backend is not None:  # last: it can hang with the CUDA driver, and no Python runs then
                _within(_WRITE_LIMIT_S, lambda: self._write_collectives(backend))
            time.sleep(_GRACE * self._tick_s)
        except (OSError, RuntimeError):  # of stderr, or of torch.distributed while it breaks down
            traceback.print_exc()
        finally:
            os._exit(EXIT_HUNG)

    def _find(self) -> str:
        """Which ranks hold up the others, as far as can be known."""
        self._roll.settled.wait((WINDOW + 4) * self._tick_s + 2)
        if (found := self._roll.verdict) is not None:
            return found
        own = alone(self._env.rank, self._sign(0))
        if self._env.world_size == 1:
            return own
        return (
            f"{own}; nothing is known of the others, since the job's store does not answer, or the rank that asked it"
        )

    def _tell(self, found: str, failure: str | None) -> None:
        stacks = f"the stacks of all ranks are in {self._logs}/hang-rank-*.txt"
        if self._env.world_size > 1:
            stacks += ", or, where a rank could not run Python, at the end of its rank-*.log"
        if failure:
            stacks = f"{self._file} could not be written ({failure}); the stacks of this rank are above"
        print(
            f"error: no progress for {self._timeout_s:g} s: {found}\n"
            f"       {stacks}\n"
            f"       go on by --resume last; if nothing hangs, but this takes longer, raise hang_timeout_s",
            file=sys.stderr,
            flush=True,
        )

    def _write_stacks(self) -> None:
        self._logs.mkdir(parents=True, exist_ok=True)
        _, doing, _, since = self._last
        with self._file.open("a", encoding="utf-8") as file:
            file.write(
                f"{now()}: no progress for {self._timeout_s:g} s\n"
                f"rank {self._env.rank} of {self._env.world_size}, process {os.getpid()} on host {platform.node()}\n"
                f"{doing} since {_clock(since)}\n"
                f"main thread, the last below: {threading.main_thread().ident:#018x}\n\n"
            )
            file.flush()
            faulthandler.dump_traceback(file)

    def _append(self, text: str) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(text)

    def _write_collectives(self, backend: str) -> None:
        """For `python -m torch.distributed.flight_recorder.fr_trace LOGS`."""
        dump = getattr(_distributed_c10d, "_dump_nccl_trace" if backend == "nccl" else "_dump_fr_trace", None)
        if dump is not None:
            (self._logs / f"{backend}_trace_rank_{self._env.rank}").write_bytes(dump())


def _within(limit_s: float, action: Callable[[], None]) -> str | None:
    """Why `action`, which may hang, has not been done; None: it has."""
    failures = [f"not done after {limit_s:g} s"]

    def run() -> None:
        try:
            action()
        except OSError as error:
            failures[0] = str(error)
        else:
            failures.clear()

    thread = threading.Thread(target=run, name="hang report", daemon=True)
    thread.start()
    thread.join(limit_s)
    return failures[0] if failures else None


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(seconds))
