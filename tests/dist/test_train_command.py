"""Training as a user starts it: the `lhcp` command, torchrun, processes, the run folder."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from runs import write_data

REPOSITORY = Path(__file__).parents[2]


def lhcp(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from lhcp.cli import main; main()", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of a small model in float64."""
    folder = tmp_path_factory.mktemp("train")
    tokens = write_data(folder)
    values: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "seq_len": 512,
        "global_batch_size": 2,
        "dtype": "float64",
        "device": "cpu",
        "model": {"preset": "tiny", "num_layers": 2, "dim": 32, "head_dim": 8, "ffn_dim": 48},
        "data": {"path": str(tokens)},
        "attention": {"topk": 16, "num_strata": 4},
        "dense_layers": [0],
        "parallel": {"cp": 2},
        "stages": [{"mode": "lighthouse", "steps": 2}, {"mode": "dense", "steps": 2}],
        "eval": {"sequences": 2, "modes": ["dense", "lighthouse", "no_attention"]},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_and_two_processes_leave_the_same_run(config: Path) -> None:
    runs = {}
    for cp in (1, 2):
        out = config.parent / f"cp{cp}"
        result = lhcp("train", config, "--set", f"parallel.cp={cp}", "--set", f"output_dir={out}")
        assert result.returncode == 0, result.stderr
        events = read(out / "events.jsonl")
        assert [event["step"] for event in events if event["event"] == "checkpoint"] == [3]
        runs[cp] = (read(out / "metrics.jsonl"), [event for event in events if event["event"] != "checkpoint"])
        assert (out / "loss.png").stat().st_size > 10_000
        assert any((out / "tensorboard").iterdir())
        saved = yaml.safe_load((out / "config.yaml").read_text())
        assert (saved["parallel"]["dp"], saved["attention"]["num_strata"]) == (1, 4)
    assert [step["stage"] for step in runs[1][0]] == ["lighthouse"] * 2 + ["dense"] * 2
    assert [step["tokens"] for step in runs[2][0]] == [1024, 2048, 3072, 4096]
    for one, two in zip(runs[1][0], runs[2][0], strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert two[key] == pytest.approx(one[key], rel=1e-9)
    assert [event["event"] for event in runs[1][1]] == ["held_out", "held_out_lighthouse", "held_out_no_attention"]
    for one, two in zip(runs[1][1], runs[2][1], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-9)


def test_the_demo_at_one_and_two_processes(tmp_path: Path) -> None:
    """The demo's own configuration, shortened: the loss curve of one process, across the stage switch."""
    tokens = write_data(tmp_path)
    curves = {}
    for cp in (1, 2):
        shorter = [
            f"data.path={tokens}", f"output_dir={tmp_path / str(cp)}", f"parallel.cp={cp}", "dtype=float64",
            "seq_len=1024", "attention.topk=24", "stages.0.steps=6", "stages.1.steps=2", "eval.sequences=1",
            "optim.warmup_steps=2",
        ]  # fmt: skip
        demo = REPOSITORY / "launch" / "configs" / "demo.yaml"
        result = lhcp("train", demo, *(word for s in shorter for word in ("--set", s)))
        assert result.returncode == 0, result.stderr
        curves[cp] = [(m["loss"], m["grad_norm"]) for m in read(tmp_path / str(cp) / "metrics.jsonl")]
    for one, two in zip(curves[1], curves[2], strict=True):
        assert two == pytest.approx(one, rel=1e-8)


def test_divergence_is_one_message(config: Path) -> None:
    out = config.parent / "diverged"
    wild = [f"output_dir={out}", "optim.lr=1e200", "optim.warmup_steps=0", "optim.max_skipped_steps=1"]
    result = lhcp("train", config, *(word for s in wild for word in ("--set", s)))
    assert result.returncode == 1
    messages = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert messages[0].startswith("error: step 3: the loss is ")
    assert "skipped after step 2: loss 5.5" in result.stdout
    assert "Traceback" not in result.stderr


def test_a_run_folder_is_never_overwritten(config: Path) -> None:
    out = config.parent / "kept"
    out.mkdir()
    (out / "metrics.jsonl").write_text("precious\n")
    result = lhcp("train", config, "--set", f"output_dir={out}")
    assert result.returncode == 2
    assert (
        result.stderr
        == f"error: output_dir {out} already holds a run; go on with it by --resume last, or choose another folder\n"
    )
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("metrics.jsonl", "precious\n")]


def test_torchrun_with_a_wrong_number_of_processes_says_so(config: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "lhcp.train"]
    result = subprocess.run([*command, str(config)], capture_output=True, text=True, timeout=240)
    assert result.returncode != 0
    messages = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert messages == [
        "error: parallel.dp unset x parallel.cp 2 does not match 3 process(es); start a multiple of 2, or set "
        "parallel.cp to a divisor of 3"
    ]


def test_the_demo_fails_when_the_model_has_not_learned(tmp_path: Path) -> None:
    """Two steps, and the outcome is judged: a demo that cannot fail shows nothing."""
    small = ["seq_len=1024", "attention.topk=32", "eval.sequences=1", "stages.0.steps=1", "stages.1.steps=1"]
    result = lhcp("demo", "--out", tmp_path / "demo", *(word for s in small for word in ("--set", s)))
    assert result.returncode == 1
    assert "entropy of a byte given the one before" in result.stdout
    assert "the run failed" in result.stdout
    assert (tmp_path / "demo" / "loss.png").exists()


def test_a_rank_of_another_node_says_what_is_wrong_there(tmp_path: Path) -> None:
    """Rank 0 speaks for the others of its node only: what it has read, another node may not have."""
    for local_rank, said in (
        ("0", rf"error: on {re.escape(platform.node())}: {tmp_path}/no.yaml: no such file\n"),
        ("1", ""),
    ):
        env = os.environ | {"RANK": "8", "LOCAL_RANK": local_rank, "WORLD_SIZE": "16"}
        command = [sys.executable, "-m", "lhcp.train", str(tmp_path / "no.yaml")]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 2
        assert re.fullmatch(said, done.stderr)
