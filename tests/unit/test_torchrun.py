"""Starting processes with torchrun: what they are given, how they end, and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lhcp
from lhcp.launch import torchrun
from lhcp.stop import EXIT_STOPPED, SIGNALS


def test_command() -> None:
    command = torchrun.command(Path("run.yaml"), ["optim.lr=1e-3", "seed=1"], 4)
    assert command[:3] == [sys.executable, "-m", "lhcp.agent"]
    assert "--standalone" in command
    assert "--nproc-per-node=4" in command
    assert command[-7:] == ["-m", "lhcp.train", "run.yaml", "--set", "optim.lr=1e-3", "--set", "seed=1"]
    assert not any("port" in word for word in command)
    assert torchrun.command(Path("run.yaml"), [], 1, ["--resume", "last"])[-3:] == ["run.yaml", "--resume", "last"]


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert [torchrun.environment(n)["OMP_NUM_THREADS"] for n in (1, 3, 32)] == ["16", "5", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert torchrun.environment(2)["OMP_NUM_THREADS"] == "7"


def test_run_starts_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "lhcp"  # found first, and the real one for all that is not in it
    package.mkdir()
    (package / "__init__.py").write_text(f"__path__.append({str(Path(lhcp.__file__).parent)!r})\n")
    (package / "train.py").write_text(
        "import json, os, pathlib, sys\n"
        "rank = os.environ['RANK']\n"
        "report = [os.environ['WORLD_SIZE'], os.environ['OMP_NUM_THREADS'], sys.argv[1:]]\n"
        "pathlib.Path(rank + '.json').write_text(json.dumps(report))\n"
        "sys.exit(3 if rank == '1' and 'fail=1' in sys.argv else 0)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert torchrun.run(Path("run.yaml"), ["seed=1"], 2) == 0
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    for rank in range(2):
        assert json.loads(Path(f"{rank}.json").read_text()) == ["2", threads, ["run.yaml", "--set", "seed=1"]]
    assert capfd.readouterr() == ("", "")
    assert torchrun.run(Path("run.yaml"), ["fail=1"], 2) == 3


CHILD = """\
import signal, sys, time
def end(signum, frame):
    print("got", signum, flush=True)
    sys.exit(9)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGHUP, end)
print("ready", flush=True)
time.sleep(30)
"""
PARENT = """\
import os, sys
import lhcp
from lhcp.launch import torchrun
sys.exit(torchrun.run_forwarding([sys.executable, "-c", sys.argv[1]], dict(os.environ)))
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on(signum: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.send_signal(signum)
        assert parent.stdout.readline() == f"got {signum.value}\n"
        assert parent.wait(timeout=20) == 9


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_before_anything_has_begun_means_to_start_again(signum: signal.Signals) -> None:
    child = "import time; print('ready', flush=True); time.sleep(30)"  # has no handler yet
    with subprocess.Popen([sys.executable, "-c", PARENT, child], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.send_signal(signum)
        assert parent.wait(timeout=20) == EXIT_STOPPED


def test_the_child_does_not_outlive_its_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        assert parent.stdout.readline() == f"got {signal.SIGTERM.value}\n"


def test_death_by_signal_is_an_exit_code() -> None:
    before = signal.getsignal(signal.SIGTERM)
    suicide = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert torchrun.run_forwarding([sys.executable, "-c", suicide], dict(os.environ)) == 128 + signal.SIGKILL
    assert signal.getsignal(signal.SIGTERM) is before
