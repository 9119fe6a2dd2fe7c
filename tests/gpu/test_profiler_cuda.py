"""A profiled run on one GPU: kernels in the trace and the table, the memory's snapshot, and unchanged losses."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flight_recorder
from lhcp import config_file
from lhcp.metrics import read_metrics
from runs import make_config, write_data

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def losses_of_a_run(data: Path, run_dir: Path, *arguments: str) -> list[float]:
    config = make_config(
        data, 1, 1, output_dir=run_dir, device="cuda", dtype="float32", deterministic=True, eval={},
        stages=[{"mode": "lighthouse", "steps": 4}],
    )  # fmt: skip
    config_file.save(config, run_dir.with_suffix(".yaml"))
    command = [sys.executable, "-m", "lhcp.train", str(run_dir.with_suffix(".yaml")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [record["loss"] for record in read_metrics(run_dir)]


def test_kernels_memory_and_the_same_losses(tmp_path: Path) -> None:
    data = write_data(tmp_path)
    plain = losses_of_a_run(data, tmp_path / "plain")
    wanted = ["--set", "profile.steps=2:3", "--set", "profile.memory=true"]
    assert losses_of_a_run(data, tmp_path / "profiled", *wanted) == plain

    folder = tmp_path / "profiled" / "profile"
    names = ["kernels-steps-2-3.txt", "memory-steps-2-3.pickle", "trace-steps-2-3.json.gz"]
    assert sorted(path.name for path in folder.iterdir()) == names
    events = json.loads(gzip.decompress((folder / names[2]).read_bytes()))["traceEvents"]
    kernels = {event["name"] for event in events if event.get("cat") == "kernel"}
    marks = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert [mark for mark in marks if mark.startswith("step ")] == ["step 2", "step 3"]

    title, _, header, *lines = (folder / names[0]).read_text().splitlines()
    assert title.endswith(" ms of kernels and copies")
    assert header.endswith("  kernel")
    listed = {line.split(maxsplit=4)[4] for line in lines}
    assert kernels
    assert kernels <= listed
    assert all(name.startswith(("Memcpy", "Memset")) for name in listed - kernels)

    (trace,) = flight_recorder.plain(folder / names[1])["device_traces"]
    allocations = [entry for entry in trace if entry["action"] == "alloc"]
    files = {frame["filename"] for entry in allocations for frame in entry["frames"]}
    assert any(name.endswith("lhcp/trainer.py") for name in files)
