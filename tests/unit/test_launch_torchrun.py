"""`lhcp launch torchrun`: the command for machines without Slurm, and a run by it."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from forked_runs import run_to_end
from lhcp import config_file
from lhcp.config import ConfigError
from lhcp.launch.cli import torchrun_command
from lhcp.metrics import read_metrics
from runs import make_config, write_data

MAIN = "from lhcp.cli import main; main()"
STAGES = [{"mode": "lighthouse", "steps": 3}, {"mode": "dense", "steps": 2}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With data."""
    folder = tmp_path_factory.mktemp("runs")
    write_data(folder)
    return folder


def write_config(folder: Path, name: str) -> Path:
    config = make_config(folder / "tokens", 1, 2, stages=STAGES, output_dir=folder / name)
    path = folder / f"{name}.yaml"
    config_file.save(config, path)
    return path


def command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", MAIN, "launch", "torchrun", *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=240)


def test_the_command(folder: Path) -> None:
    write_config(folder, "it's a run")
    size = ["--nodes", "2", "--gpus-per-node", "1", "--head", "n1:29400"]
    done = command("it's a run.yaml", *size, "--set", "optim.lr=1e-3", "--set", "seed=1", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert shlex.split(done.stdout) == [
        sys.executable, "-m", "lhcp.agent", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
        "--rdzv-endpoint=n1:29400", "--rdzv-id=it's a run", "-m", "lhcp.train", "it's a run.yaml",
        "--set", "optim.lr=1e-3", "--set", "seed=1",
    ]  # fmt: skip
    done = command("it's a run.yaml", *size, "--resume", "last", cwd=folder)
    assert shlex.split(done.stdout)[-3:] == ["it's a run.yaml", "--resume", "last"]


@pytest.mark.parametrize("head", ["n1", ":29400", "n1:", "n1:port", "n1:0", "n1:65536", "n1:-1"])
def test_wrong_heads(folder: Path, head: str) -> None:
    with pytest.raises(ConfigError) as error:
        torchrun_command(folder / "none.yaml", head, 1, 1)
    assert str(error.value) == f"--head: given {head!r}, must be HOST:PORT with a port from 1 to 65535"


def test_wrong_configurations(folder: Path) -> None:
    """Found here, before any machine starts."""
    path = write_config(folder, "wrong")
    of_size = (
        "parallel.dp 1 x parallel.cp 2 does not match 1 process(es); start 2, or set parallel.cp to a divisor of 1"
    )
    cases = {"1": of_size, "2": "seed: given 'one', must be a whole number"}
    for processes, message in cases.items():
        sets = [] if processes == "1" else ["--set", "seed=one"]
        size = ["--nodes", "1", "--gpus-per-node", processes, "--head", "n1:29400"]
        done = command(path, *size, *sets, cwd=folder)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


def test_a_run(folder: Path) -> None:
    assert run_to_end(2, [str(write_config(folder, "forked"))], folder / "forked.out") == [0, 0]
    path = write_config(folder, "by torchrun")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    size = ["--nodes", "1", "--gpus-per-node", "2", "--head", f"localhost:{port}"]
    done = command(path, *size, "--execute", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    found, expected = (
        [(record["step"], record["loss"], record["grad_norm"]) for record in read_metrics(folder / name)]
        for name in ("by torchrun", "forked")
    )
    assert found == expected
    assert [step for step, _, _ in found] == [0, 1, 2, 3, 4]
