"""The scaling benchmark as it is started, and what it does when attention over ranks is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import scaling
from lhcp import config_file
from lhcp.distributed import ContextParallel
from ranks import run_ranks

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    values = {
        "output_dir": str(tmp_path / "run"), "seq_len": 512, "global_batch_size": 2, "device": "cpu",
        "model": {"preset": "tiny", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}, "parallel": {"cp": 2},
        "data": {"path": "none"}, "attention": {"topk": 16, "num_strata": 8},
        "stages": [{"mode": "dense", "steps": 1}],
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


def start(nproc: int, *words: str | Path) -> subprocess.CompletedProcess[str]:
    agent = [sys.executable, "-m", "lhcp.agent", "--standalone", f"--nproc-per-node={nproc}"]
    return subprocess.run(
        [*agent, "-m", "benchmarks.scaling", *map(str, words)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=REPOSITORY,
    )  # fmt: skip


def test_ranks_check_and_measure(config: Path, tmp_path: Path) -> None:
    """Two groups of two ranks, side by side; no stage of the run uses Lighthouse."""
    out = tmp_path / "sweep" / "n512-cp2.json"
    done = start(4, config, "--out", out, "--repeats", "2", "--set", "compute_dtype=float64")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert {key: found["config"][key] for key in ("seq_len", "dp", "cp", "dtype")} == {
        "seq_len": 512, "dp": 2, "cp": 2, "dtype": "float64",
    }  # fmt: skip
    check = found["check"]
    assert (check["passed"], check["against"], check["length"]) == (True, "one process in float64", 512)
    assert 0 < max(check["errors"].values()) <= 1e-10
    assert check["errors"]["selection"] == 0
    for kind in ("lighthouse", "dense"):
        assert found[kind]["forward"]["p50_ms"] > 0
        assert 0 < found[kind]["peak_memory_gib"] < 4
    sparse = found["lighthouse"]
    assert sparse["tokens_per_s_per_rank"] == pytest.approx(256 / sparse["forward_backward"]["p50_ms"] * 1e3)
    assert found["environment"]["ranks"] == 4
    assert done.stdout.splitlines()[2].split()[1:6:2] == ["n512-cp2", "512", "2"]
    assert list(out.parent.iterdir()) == [out]


def test_a_wrong_configuration_is_one_message(config: Path, tmp_path: Path) -> None:
    done = start(2, config, "--out", tmp_path / "out.json", "--set", "attention.num_strata=2")
    assert done.returncode == 2
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1
    assert "num_strata 2 is not legal" in messages[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("with_dense", [True, False])
def test_no_speed_without_the_halo(config: Path, with_dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContextParallel, "halo", lambda self, rows: torch.zeros_like(rows))
    resolved = config_file.load(config).resolve(2)

    def rank_main(rank: int) -> dict[str, Any]:
        return scaling.measure(resolved, torch.device("cpu"), 1, with_dense)

    for found in run_ranks(2, rank_main):
        assert not found["check"]["passed"]
        assert found["check"]["errors"]["lighthouse out"] > 1e-3
        assert found["check"]["errors"]["dense out"] < 1e-5
        assert not {"lighthouse", "dense", "ratio"} & found.keys()


def test_a_failed_check_is_written_and_ends_with_1(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling.layers, "TOLERANCE", {"float32": 1e-9})
    out = tmp_path / "out.json"
    assert scaling.main([str(config), "--out", str(out), "--set", "parallel.cp=1"]) == 1
    assert "nothing was timed" in capsys.readouterr().err
    assert "p50_ms" not in out.read_text()
    assert scaling.main(["report", str(tmp_path)]) == 1
    assert "- out: check failed against one process in float64, N = 512: " in capsys.readouterr().out
