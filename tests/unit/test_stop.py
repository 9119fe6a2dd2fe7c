"""Signals in one process; how ranks agree is in tests/dist/test_stop.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lhcp.stop import EXIT_FORCED, SIGNALS, stop_on_signal


def wait(condition: object) -> None:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    with stop_on_signal(5) as request:
        assert request.signal is None
        os.kill(os.getpid(), number)
        wait(lambda: request.signal)
        os.kill(os.getpid(), SIGNALS[0])
        assert request.signal == number, "the first counts"
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_ctrl_c_is_none_of_them() -> None:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with stop_on_signal(0.05) as request:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)
        assert request.signal is None
    signal.signal(signal.SIGINT, previous)


def test_leaving_in_time_ends_the_countdown() -> None:
    with stop_on_signal(0.2) as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        wait(lambda: request.signal)
    time.sleep(0.3)


# Compiles a kernel, for which LLVM runs; is told by these signals, or by the last one while it enters.
COMPILING = """\
import os, signal, sys, time
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lhcp.stop import stop_on_signal

def kernel(x):
    triton.language.store(x, 1.0)

def compile_and_tell(*args, **options):
    compile(*args, **options)
    os.kill(os.getpid(), numbers.pop())

cache, when, *names = sys.argv[1:]
numbers = [signal.Signals[name] for name in names]
compile = triton.compile
if when == "early":
    triton.compile = compile_and_tell
with stop_on_signal(60, compiles=True) as request:
    os.environ["TRITON_CACHE_DIR"] = cache
    compile(ASTSource(triton.jit(kernel), {"x": "*fp32"}, {}), target=GPUTarget("cuda", 90, 32))
    for number in numbers:
        try:
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        except KeyboardInterrupt:
            pass
    deadline = time.monotonic() + 10
    while request.signal is None and time.monotonic() < deadline:
        time.sleep(0.01)
    print(request.signal and request.signal.name)
"""


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("when", [["early"], ["later"], ["later", "SIGINT"]], ids=" ".join)
def test_triton_loses_no_signal(tmp_path: Path, when: list[str], number: signal.Signals) -> None:
    """Nor one that comes while LLVM takes it, nor after one that LLVM acts upon; nor for want of a cache."""
    (tmp_path / "compiling.py").write_text(COMPILING)
    (tmp_path / "no-folder").touch()
    environment = {
        **os.environ,
        "HOME": "/proc/none",
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(tmp_path / "no-folder"),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(tmp_path / "compiling.py"), str(tmp_path / "cache"), *when, number.name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"{number.name}\n"), done.stderr


def test_no_wait_in_c_outlasts_the_time() -> None:
    """A main thread that is inside a C function, which runs no Python and gives signals no chance to be handled."""
    code = (
        "import ctypes, os, signal\n"
        "from lhcp.stop import stop_on_signal\n"
        "with stop_on_signal(0.2):\n"
        "    print('ready', flush=True)\n"
        "    libc = ctypes.CDLL(None)\n"
        "    while True: libc.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGUSR1)
        _, err = process.communicate(timeout=60)
    assert process.returncode == EXIT_FORCED
    assert b"still busy 0.2 s after SIGUSR1" in err
    assert b"most recent call first" in err
