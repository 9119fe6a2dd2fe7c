"""Profiled runs of two ranks: one trace, of the steps of this start, and nothing else is different."""

from __future__ import annotations

import gzip
import json
import signal
import time
from pathlib import Path

import pytest

from forked_runs import ForkedRun, run_to_end
from lhcp import config_file
from lhcp.checkpoint.folder import published
from lhcp.metrics import METRICS_FILE, read_metrics
from lhcp.stop import EXIT_STOPPED
from runs import make_config, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def plain(data: Path) -> Path:
    """A run of 8 steps that is not profiled, with a checkpoint after 4."""
    run_dir = data.parent / "plain"
    assert run_to_end(2, [write_config(data, run_dir)], data.parent / "out.txt") == [0, 0]
    assert not (run_dir / "profile").exists()
    return run_dir


def write_config(data: Path, run_dir: Path) -> str:
    config = make_config(
        data, 1, 2, output_dir=run_dir, checkpoint={"every": 4}, eval={}, global_batch_size=1,
        stages=[{"mode": mode, "steps": 4} for mode in ("lighthouse", "dense")],
    )  # fmt: skip
    path = run_dir.with_suffix(".yaml")
    config_file.save(config, path)
    return str(path)


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir)]


def steps_in(trace: Path) -> list[int]:
    """The steps that a trace marks, which hold all its products of matrices."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    marks = [event for event in events if event["name"].startswith("step ") and event["cat"] == "user_annotation"]
    products = [event["ts"] for event in events if event["name"] == "aten::mm"]
    assert products
    assert all(any(mark["ts"] <= ts <= mark["ts"] + mark["dur"] for mark in marks) for ts in products)
    return sorted(int(mark["name"].removeprefix("step ")) for mark in marks)


def files(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "profile").iterdir())


def test_exactly_these_steps_and_the_same_losses(data: Path, plain: Path, tmp_path: Path) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "out.txt"
    assert run_to_end(2, [write_config(data, run_dir), "--set", "profile.steps=2:3"], output) == [0, 0]
    assert files(run_dir) == ["kernels-steps-2-3.txt", "trace-steps-2-3.json.gz"]
    assert steps_in(run_dir / "profile" / "trace-steps-2-3.json.gz") == [2, 3]
    assert losses(run_dir) == losses(plain)
    assert output.read_text().count("opens in https://ui.perfetto.dev") == 1


def test_a_resumed_run_records_what_it_runs_of_the_range(data: Path, plain: Path, tmp_path: Path) -> None:
    """A profile is no change of what is computed: it needs no --allow-change."""
    expected, output = losses(plain), tmp_path / "out.txt"
    path = str(plain.with_suffix(".yaml"))
    assert run_to_end(2, [path, "--resume", "4", "--set", "profile.steps=3:6"], output) == [0, 0], output.read_text()
    assert "changed since: profile.steps from None to '3:6'" in output.read_text()
    assert files(plain) == ["kernels-steps-5-6.txt", "trace-steps-5-6.json.gz"]
    assert steps_in(plain / "profile" / "trace-steps-5-6.json.gz") == [5, 6]
    assert losses(plain) == expected


def test_a_run_that_is_stopped_in_the_range_keeps_what_it_has(data: Path, tmp_path: Path) -> None:
    """On all ranks' exit with 75: the others wait for the trace."""
    run_dir, output = tmp_path / "run", tmp_path / "out.txt"
    run = ForkedRun(2, [write_config(data, run_dir), "--set", "profile.steps=2:20"], output)
    deadline = time.monotonic() + 60
    while not (run_dir / METRICS_FILE).exists() or len(read_metrics(run_dir)) < 2:
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.002)
    run.send(signal.SIGTERM)
    assert run.wait() == [EXIT_STOPPED, EXIT_STOPPED], output.read_text()
    (step, *_) = published(run_dir)
    assert 2 <= step < 20
    assert files(run_dir) == [f"kernels-steps-2-{step}.txt", f"trace-steps-2-{step}.json.gz"]


def test_a_profile_that_cannot_be_written_costs_a_warning(data: Path, plain: Path, tmp_path: Path) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "out.txt"
    run_dir.mkdir()
    (run_dir / "profile").write_text("not a folder")
    assert run_to_end(2, [write_config(data, run_dir), "--set", "profile.steps=7:99"], output) == [0, 0]
    assert "warning: the profile of steps 7 to 8 is not written: [Errno 17] File exists" in output.read_text()
    assert losses(run_dir) == losses(plain)
