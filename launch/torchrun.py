"""Starting a run on this machine with torchrun. Needs no torch itself: the processes that it starts do."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from lhcp.stop import EXIT_STOPPED, SIGNALS

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


NO_TORCH = f"this needs PyTorch, which {sys.executable} has not: pip install torch, or use a Python that has it"


def command(config_path: Path, overrides: Sequence[str], nproc: int, flags: Sequence[str] = ()) -> list[str]:
    """The command line that trains `config_path` in `nproc` processes of this machine."""
    sets = [word for override in overrides for word in ("--set", override)]
    return of_module("lhcp.train", [str(config_path), *sets, *flags], nproc)


def of_module(module: str, words: Sequence[str], nproc: int) -> list[str]:
    """The command line that runs a module with these arguments in `nproc` processes of this machine.

    `--standalone` makes torchrun pick a free port, so runs can share a machine.
    """
    return [sys.executable, "-m", "lhcp.agent", "--standalone", f"--nproc-per-node={nproc}", "-m", module, *words]


def on_each_node(
    config_path: Path, overrides: Sequence[str], nodes: int, nproc: int, head: str, resume: str | None
) -> list[str]:
    """The command line that trains on several machines: the same on each, `nproc` processes on each.

    Args:
        config_path, overrides: of the run.
        nodes: machines.
        nproc: processes on each, one a GPU.
        head: HOST:PORT of one of them, at which they meet.
        resume: see `lhcp.train`.
    """
    meet = [f"--nnodes={nodes}", f"--nproc-per-node={nproc}", "--rdzv-backend=c10d", f"--rdzv-endpoint={head}",
            f"--rdzv-id={config_path.stem}"]  # fmt: skip
    sets = [word for override in overrides for word in ("--set", override)]
    flags = [] if resume is None else ["--resume", resume]
    return [sys.executable, "-m", "lhcp.agent", *meet, "-m", "lhcp.train", str(config_path), *sets, *flags]


def environment(nproc: int) -> dict[str, str]:
    """This process's environment, with the cores shared out unless OMP_NUM_THREADS is set already."""
    cores = os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // nproc)), **os.environ}


def run(config_path: Path, overrides: Sequence[str], nproc: int, flags: Sequence[str] = ()) -> int:
    """Train `config_path` in `nproc` processes and wait for them.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on to torchrun, which passes them on to the processes. Call it from
    the main thread: only there can signals be handled.

    Returns:
        The exit code: 0 when all processes succeeded, else that of the first that failed; 128 + n for signal n, but
        `EXIT_STOPPED` for one of `lhcp.stop.SIGNALS` that came before anything had begun.

    Raises:
        OSError: when the interpreter cannot be started.
    """
    return run_forwarding(command(config_path, overrides, nproc, flags), environment(nproc))


def run_forwarding(argv: Sequence[str], env: dict[str, str]) -> int:
    """See `run`."""
    child: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def forward(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        if child is not None:
            child.send_signal(signum)

    previous = {signum: signal.signal(signum, forward) for signum in _FORWARDED}
    try:
        # A session of its own: else Ctrl-C reaches torchrun twice, from the terminal and from here, and the
        # second one breaks off its orderly shutdown.
        child = subprocess.Popen(argv, env=env, start_new_session=True, preexec_fn=_die_with_parent)
        for signum in received:
            child.send_signal(signum)
        code = child.wait()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if -code in SIGNALS and -code in received:
        return EXIT_STOPPED  # so early that it could not be noted: nothing has begun
    return code if code >= 0 else 128 - code


def _die_with_parent() -> None:
    """In the child: be told to end when this process is killed, so that no ranks are left training (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
