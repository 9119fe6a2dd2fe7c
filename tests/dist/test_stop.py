"""SIGTERM and SIGUSR1: all ranks save after the same step and exit with 75; a rank that hangs is forced to, with 76."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from forked_runs import ForkedRun, only_on, run_to_end
from lhcp import config_file
from lhcp.checkpoint.folder import published
from lhcp.data import BatchLoader
from lhcp.metrics import METRICS_FILE, read_metrics
from lhcp.stop import EXIT_FORCED, EXIT_STOPPED
from runs import make_config, write_data
from saved import published_tensors

STEPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def left_alone(data: Path) -> dict[str, torch.Tensor]:
    run_dir = data.parent / "left-alone"
    assert run_to_end(2, [write_config(data, run_dir)], data.parent / "out.txt") == [0, 0]
    return published_tensors(run_dir, STEPS)


def write_config(data: Path, run_dir: Path, **checkpoint: float) -> str:
    config = make_config(data, 1, 2, output_dir=run_dir, checkpoint={"every": 0, **checkpoint}, eval={})
    path = run_dir.with_suffix(".yaml")
    config_file.save(config, path)
    return str(path)


def wait_for_file(path: Path, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.002)


def wait_for_step(run_dir: Path, step: int, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done = read_metrics(run_dir) if (run_dir / METRICS_FILE).exists() else []
        if done and done[-1]["step"] >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"{run_dir} has not come to step {step}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_the_command_saves_and_is_resumed(
    data: Path, tmp_path: Path, number: signal.Signals, left_alone: dict[str, torch.Tensor]
) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "lhcp.agent", "--standalone", "--nproc-per-node=2", "-m", "lhcp.train"]
    command += [write_config(data, run_dir), "--resume", "last"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_step(run_dir, 3)
        process.send_signal(number)
        out, err = process.communicate(timeout=180)
    assert process.returncode == EXIT_STOPPED
    (step,) = published(run_dir)
    assert 4 <= step < STEPS
    assert f"stopped by {number.name} after step {step} of {STEPS}, which is saved; go on by --resume last" in out
    assert err == ""
    assert [record["step"] for record in read_metrics(run_dir)] == list(range(step))

    assert run_to_end(2, [str(run_dir.with_suffix(".yaml")), "--resume", "last"], tmp_path / "out.txt") == [0, 0]
    final = published_tensors(run_dir, STEPS)
    assert all(torch.equal(final[name], left_alone[name]) for name in left_alone)


@pytest.mark.parametrize("seconds", [0.5, 2.0, 3.5])
def test_a_signal_at_any_moment_of_the_start_means_to_start_again(data: Path, tmp_path: Path, seconds: float) -> None:
    """While the launcher or the ranks import torch, or the ranks find each other: nothing is lost, so 75."""
    command = [sys.executable, "-c", "from lhcp.cli import main; main()", "train", write_config(data, tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=180)
    assert process.returncode in (EXIT_STOPPED, -signal.SIGTERM)  # the latter before there is any handler
    assert "Traceback" not in err
    assert seconds < 1 or process.returncode == EXIT_STOPPED


@pytest.mark.parametrize("told", [[0], [1]])
def test_one_rank_is_told_and_all_stop(data: Path, tmp_path: Path, told: list[int]) -> None:
    run_dir = tmp_path / "run"
    run = ForkedRun(2, [write_config(data, run_dir)], tmp_path / "out.txt")
    wait_for_step(run_dir, 2)
    run.send(signal.SIGTERM, told)
    run.send(signal.SIGUSR1, told)
    assert run.wait() == [EXIT_STOPPED, EXIT_STOPPED]
    assert len(published(run_dir)) == 1


def hang(marker: Path, rank: int) -> None:
    """Before step 3, where `marker` appears."""
    original = BatchLoader.micro_batches

    def stuck(self: BatchLoader, step: int) -> object:
        if step == 3:
            marker.touch()
            os.read(os.pipe()[0], 1)
        return original(self, step)

    BatchLoader.micro_batches = stuck


def test_a_rank_that_hangs_is_forced_to_exit(data: Path, tmp_path: Path) -> None:
    """Rank 1 reads a pipe that nobody writes to, and rank 0 waits for it inside a collective."""

    run_dir, output, marker = tmp_path / "run", tmp_path / "out.txt", tmp_path / "hangs"
    run = ForkedRun(2, [write_config(data, run_dir, stop_timeout_s=1)], output, only_on(1, partial(hang, marker)))
    wait_for_file(marker)
    started = time.monotonic()
    run.send(signal.SIGTERM)
    codes = run.wait()
    assert codes == [EXIT_FORCED, EXIT_FORCED]
    assert 0.9 < time.monotonic() - started < 5
    assert published(run_dir) == []


def test_the_stacks_say_where_it_hangs(data: Path, tmp_path: Path) -> None:
    """One rank is told, so that the stacks of two do not mix."""
    run_dir, output, marker = tmp_path / "run", tmp_path / "out.txt", tmp_path / "hangs"
    run = ForkedRun(2, [write_config(data, run_dir, stop_timeout_s=1)], output, only_on(1, partial(hang, marker)))
    wait_for_file(marker)
    run.send(signal.SIGTERM, [1])
    assert run.wait()[1] == EXIT_FORCED
    text = output.read_text()
    assert "error: still busy 1 s after SIGTERM; forced to exit, nothing was saved" in text
    assert "in stuck" in text
