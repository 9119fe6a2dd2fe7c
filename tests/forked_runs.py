"""Whole runs, `lhcp.train.main` in real processes, started in milliseconds: forked, with torch imported already."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.utils.tensorboard  # noqa: F401  (imported once here, not in every forked process)
from torch.distributed import TCPStore

import ranks  # noqa: F401  (likewise)
from lhcp import train


class ForkedRun:
    """The ranks of one start of a run, as torchrun would start them: it, too, keeps the store for them.

    Args:
        world: processes.
        arguments: of lhcp.train.
        output: file that their stdout and stderr are appended to.
        before: called in each process with its rank, before training.
    """

    def __init__(
        self, world: int, arguments: Sequence[str], output: Path, before: Callable[[int], None] = lambda rank: None
    ) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._output = output
        self.codes: dict[int, int] = {}
        """Exit codes, -n for signal n, of the ranks that have ended."""
        self._pids = {}
        # None begins before all are there: in a process forked while the store's thread answers another, a lock that
        # it held stays held.
        may_begin, begin = os.pipe()
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                os.close(begin)
                os.read(may_begin, 1)
                os.close(may_begin)
                _train(rank, world, self._store.port, arguments, output, before)
            self._pids[rank] = pid
        os.close(begin)
        os.close(may_begin)

    def alive(self) -> list[int]:
        """Ranks that have not ended."""
        for rank in self._pids.keys() - self.codes.keys():
            pid, status = os.waitpid(self._pids[rank], os.WNOHANG)
            if pid:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
        return sorted(self._pids.keys() - self.codes.keys())

    def send(self, number: signal.Signals, to: Sequence[int] | None = None) -> None:
        """Signal these ranks, or all, as far as they are alive."""
        for rank in self.alive():
            if to is None or rank in to:
                os.kill(self._pids[rank], number)

    def wait(self, timeout: float = 240.0) -> list[int]:
        """Exit codes by rank. When one has failed the others get a second, then SIGKILL, as with torchrun."""
        deadline = time.monotonic() + timeout
        while self.alive():
            if any(self.codes.values()) and not self._all_end_by(time.monotonic() + 1):
                self.send(signal.SIGKILL)
            if time.monotonic() > deadline:
                late = self.alive()
                self.send(signal.SIGABRT)  # which each answers with where it is
                if not self._all_end_by(time.monotonic() + 10):
                    self.send(signal.SIGKILL)
                raise AssertionError(f"ranks {late} have not ended after {timeout} s\n{self._output.read_text()}")
            time.sleep(0.002)
        return [self.codes[rank] for rank in sorted(self.codes)]

    def _all_end_by(self, deadline: float) -> bool:
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        return not self.alive()


def _train(
    rank: int, world: int, port: int, arguments: Sequence[str], output: Path, before: Callable[[int], None]
) -> None:
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        faulthandler.enable(descriptor)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
        before(rank)
        code = train.main(list(arguments))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def run_to_end(world: int, arguments: Sequence[str], output: Path) -> list[int]:
    """Start a run and wait for it: its exit codes."""
    return ForkedRun(world, arguments, output).wait()


def kill_at_file_operation(number: int, folder: Path) -> Callable[[int], None]:
    """For `before`: kill -9 this process when it is about to do its `number`-th operation on files in `folder`.

    Python announces opening, making, renaming and removing files, before it does so.
    """

    def install(rank: int) -> None:
        seen = 0

        def watch(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal seen
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod") and arguments:
                seen += str(arguments[0]).startswith(str(folder))
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)

    return install


def only_on(victim: int, action: Callable[[int], None]) -> Callable[[int], None]:
    """For `before`: `action` on one rank."""
    return lambda rank: action(rank) if rank == victim else None
