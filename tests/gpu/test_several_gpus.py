"""Runs over NCCL on two GPUs: the losses of one GPU, and what happens to ranks that are told, killed or stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flight_recorder import entries
from lhcp import config_file
from lhcp.config import RunConfig
from lhcp.metrics import read_metrics
from lhcp.stop import EXIT_HUNG, EXIT_STOPPED
from runs import make_config, write_data
from waiting import until

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")]
MODEL = {"vocab_size": 257, "dim": 128, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64,
         "ffn_dim": 192}  # fmt: skip
FLOAT64 = {"dtype": "float64"}
BFLOAT16 = {"dtype": "float32", "compute_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


class Launched:
    """A run of `dp` x `cp` ranks, a GPU each, under torchrun; and again, with further arguments."""

    def __init__(self, data: Path, run_dir: Path, dp: int, cp: int, **changes: object) -> None:
        values = {"output_dir": run_dir, "device": "cuda", "model": MODEL, "seq_len": 1440, "eval": {}, **changes}
        self.config: RunConfig = make_config(data, dp, cp, **values)
        self.path = run_dir.with_suffix(".yaml")
        config_file.save(self.config, self.path)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        ranks = self.config.parallel.dp * self.config.parallel.cp
        agent = [sys.executable, "-m", "lhcp.agent", "--standalone", f"--nproc-per-node={ranks}", "-m", "lhcp.train"]
        with self.path.with_suffix(".out").open("ab") as output:
            return subprocess.Popen([*agent, str(self.path), *arguments], stdout=output, stderr=output)

    @property
    def output(self) -> str:
        return self.path.with_suffix(".out").read_text()

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in read_metrics(self.config.output_dir)]

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            return (self.config.output_dir / "metrics.jsonl").exists() and len(self.losses) > step

        until(reached, 120, lambda: self.output)


def rank_process(agent: subprocess.Popen[bytes], rank: int) -> int:
    """The process of a rank."""
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no rank {rank}")


def test_losses_are_those_of_one_gpu(data: Path, tmp_path: Path) -> None:
    losses = []
    for dp, cp in ((1, 1), (1, 2), (2, 1)):
        run = Launched(data, tmp_path / f"{dp}x{cp}", dp, cp, **FLOAT64)
        assert run.start().wait(120) == 0, run.output
        losses.append(run.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[2] == pytest.approx(losses[0], rel=1e-9)
    assert losses[0][-1] < losses[0][0] - 1


def test_told_to_stop_and_killed(data: Path, tmp_path: Path) -> None:
    stages = [{"mode": "lighthouse", "steps": 100}, {"mode": "dense", "steps": 100}]  # some seconds, in which to act
    changes = {**BFLOAT16, "stages": stages, "deterministic": True, "checkpoint": {"every": 10}}
    whole, run = (Launched(data, tmp_path / name, 1, 2, **changes) for name in ("whole", "interrupted"))
    assert whole.start().wait(120) == 0, whole.output

    agent = run.start()
    run.wait_for_step(8)
    agent.send_signal(signal.SIGUSR1)
    assert agent.wait(60) == EXIT_STOPPED, run.output

    agent = run.start("--resume", "last")
    run.wait_for_step(104)
    os.kill(rank_process(agent, 1), signal.SIGKILL)
    assert agent.wait(60) == 128 + signal.SIGKILL, run.output

    assert run.start("--resume", "last").wait(120) == 0, run.output
    assert run.losses == whole.losses


def test_a_stopped_rank_is_named_and_the_last_collectives_are_kept(data: Path, tmp_path: Path) -> None:
    stages = [{"mode": "lighthouse", "steps": 4000}]
    run = Launched(data, tmp_path / "stopped", 1, 2, **BFLOAT16, stages=stages, hang_timeout_s=15, compile=False)
    agent = run.start()
    run.wait_for_step(5)
    os.kill(rank_process(agent, 1), signal.SIGSTOP)
    assert agent.wait(120) == EXIT_HUNG, run.output
    assert re.search(r"error: no progress for 15 s: rank 1 on host \S+ gives no sign of life since", run.output)
    logs = run.config.output_dir / "logs"
    assert re.search(r'lhcp/run\.py", line \d+ in run$', (logs / "hang-rank-00000.txt").read_text(), re.MULTILINE)
    assert any(entry["state"] != "completed" for entry in entries(logs / "nccl_trace_rank_0"))
