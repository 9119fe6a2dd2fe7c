"""The agent of a node: signals before and while there are ranks."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lhcp.stop import EXIT_FORCED, EXIT_STOPPED, SIGNALS
from waiting import until

# Says that it is there, and ends with this code when it is told to stop.
RANK = """\
import pathlib, signal, sys, time
signal.signal(signal.{name}, lambda *_: sys.exit({code}))
pathlib.Path("there").touch()
time.sleep(60)
"""


def agent(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "lhcp.agent", *arguments],
        cwd=folder,
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def _catches(pid: int, number: signal.Signals) -> bool:
    mask = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)


def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize("number", SIGNALS)
def test_told_while_it_waits_for_the_first_node(tmp_path: Path, number: signal.Signals) -> None:
    """Connecting, in C, takes a minute."""
    meet = [f"--rdzv-endpoint=127.0.0.1:{unused_port()}", "--rdzv-backend=c10d", "--rdzv-conf=is_host=0"]
    running = agent(tmp_path, "--nnodes=2", "--nproc-per-node=1", *meet, "-m", "lhcp.train", "no.yaml")
    until(lambda: _catches(running.pid, number), 30, lambda: "no handler")
    time.sleep(2)
    running.send_signal(number)
    told = time.monotonic()
    assert running.wait(30) == EXIT_STOPPED
    assert time.monotonic() - told < 5


def test_cancelled_before_it_began(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "cancelled").write_text("7\n8\n")
    running = agent(tmp_path, "--standalone", "-m", "lhcp.train", "no.yaml", LHCP_OUT=str(tmp_path), SLURM_JOB_ID="8")
    assert running.wait(30) == EXIT_STOPPED


@pytest.mark.parametrize(("code", "result"), [(EXIT_STOPPED, EXIT_STOPPED), (0, 0), (2, 2), (1, EXIT_FORCED)])
def test_a_rank_that_fails_when_it_is_told_to_stop(tmp_path: Path, code: int, result: int) -> None:
    """It is not to be tried again in the little time that is left."""
    (tmp_path / "rank.py").write_text(RANK.format(name="SIGUSR1", code=code))
    running = agent(tmp_path, "--standalone", "rank.py")
    until((tmp_path / "there").exists, 30, lambda: "no rank")
    running.send_signal(signal.SIGUSR1)
    assert running.wait(30) == result
