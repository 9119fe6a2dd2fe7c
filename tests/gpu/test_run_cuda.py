"""Whole runs on one GPU: deterministic mode, and stopping and going on, bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lhcp import config_file
from lhcp.config import RunConfig
from lhcp.metrics import read_metrics
from runs import make_config, write_data
from saved import published_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
STEPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def cuda_config(data: Path, run_dir: Path, deterministic: bool) -> RunConfig:
    """Head width 64, which the fused attention kernels take."""
    model = {"vocab_size": 257, "dim": 128, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64,
             "ffn_dim": 192}  # fmt: skip
    return make_config(
        data, 1, 1, output_dir=run_dir, model=model, device="cuda", dtype="float32", compute_dtype="bfloat16",
        deterministic=deterministic, checkpoint={"every": 7}, seq_len=1440, eval={},
    )  # fmt: skip


def train(config: RunConfig, *arguments: str) -> str:
    path = config.output_dir.with_suffix(".yaml")
    path.unlink(missing_ok=True)
    config_file.save(config, path)
    done = subprocess.run(
        [sys.executable, "-m", "lhcp.train", str(path), *arguments], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_deterministic_runs_are_bit_identical_and_so_is_a_resumed_one(data: Path, tmp_path: Path) -> None:
    states = []
    for name in ("one", "two"):
        train(cuda_config(data, tmp_path / name, deterministic=True))
        states.append(published_tensors(tmp_path / name, STEPS))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

    out = train(cuda_config(data, tmp_path / "two", deterministic=True), "--resume", "7")
    assert "resumed from" in out
    resumed = published_tensors(tmp_path / "two", STEPS)
    assert all(torch.equal(states[0][name], resumed[name]) for name in resumed)


def test_the_usual_kernels_learn_the_same_up_to_rounding(data: Path, tmp_path: Path) -> None:
    train(cuda_config(data, tmp_path / "fast", deterministic=False))
    train(cuda_config(data, tmp_path / "exact", deterministic=True))
    fast, exact = ([record["loss"] for record in read_metrics(tmp_path / name)] for name in ("fast", "exact"))
    assert fast[:6] == pytest.approx(exact[:6], rel=5e-3)  # then rounding has grown into other trajectories
    assert fast[-1] < fast[0] - 1
