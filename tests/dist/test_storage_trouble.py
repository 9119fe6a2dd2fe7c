"""Full disks, read-only folders, folders that vanish: what is published is whole, and nothing else is ever loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from forked_runs import ForkedRun, run_to_end
from lhcp import config_file
from lhcp.checkpoint.folder import FOLDER, published, step_folder
from lhcp.checkpoint.manifest import Checkpoint
from lhcp.metrics import read_metrics
from runs import make_config, write_data
from saved import published_tensors
from waiting import until

STEPS = 60
needs_mount = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def left_alone(data: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    run_dir = data.parent / "left-alone"
    assert run_to_end(2, [write_config(data, run_dir, data.parent)], data.parent / "out.txt") == [0, 0]
    return published_tensors(run_dir, STEPS), [record["loss"] for record in read_metrics(run_dir)]


def write_config(data: Path, run_dir: Path, folder: Path, cp: int = 2) -> str:
    stages = [{"mode": "lighthouse", "steps": STEPS}]
    config = make_config(
        data, 1, cp, output_dir=run_dir, checkpoint={"every": 2, "keep": 1}, eval={}, stages=stages, global_batch_size=1
    )
    path = folder / f"{run_dir.name}.yaml"
    config_file.save(config, path)
    return str(path)


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """Use up the disk, but for a few bytes that a line of metrics may still get."""
    with path.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(1024))
            except OSError:
                return


def all_whole(run_dir: Path) -> list[int]:
    for step in published(run_dir):
        Checkpoint.open(step_folder(run_dir, step)).verify()
    return published(run_dir)


@needs_mount
def test_a_full_disk_that_is_freed_costs_nothing(
    data: Path, tmp_path: Path, left_alone: tuple[dict[str, torch.Tensor], list[float]]
) -> None:
    """Saves fail and are reported, metrics wait in memory; when there is room again, everything is there."""
    with small_disk(tmp_path / "disk", "size=6m") as disk:
        run_dir, output = disk / "run", tmp_path / "out.txt"
        run = ForkedRun(2, [write_config(data, run_dir, tmp_path)], output)
        until(lambda: len(published(run_dir)) > 0, 60, lambda: "no checkpoint", every=0.002)
        fill(disk / "filler")
        until(lambda: "checkpoint failed" in output.read_text() or not run.alive(), 60, output.read_text, every=0.002)
        (disk / "filler").unlink()
        assert run.wait() == [0, 0], output.read_text()
        assert "No space left on device" in output.read_text()
        final = published_tensors(run_dir, STEPS)
        assert all(torch.equal(final[name], left_alone[0][name]) for name in final)
        assert [record["loss"] for record in read_metrics(run_dir)] == left_alone[1]


@needs_mount
def test_a_disk_that_stays_full_ends_the_run_and_it_resumes(
    data: Path, tmp_path: Path, left_alone: tuple[dict[str, torch.Tensor], list[float]]
) -> None:
    with small_disk(tmp_path / "disk", "size=6m") as disk:
        run_dir, output = disk / "run", tmp_path / "out.txt"
        arguments = [write_config(data, run_dir, tmp_path), "--resume", "last"]
        run = ForkedRun(2, arguments, output)
        until(lambda: len(published(run_dir)) > 0, 60, lambda: "no checkpoint", every=0.002)
        fill(disk / "filler")
        assert run.wait() == [1, 1]
        assert "error: the last 3 checkpoints could not be written: rank " in output.read_text()
        assert len(all_whole(run_dir)) == 1
        assert len(list((run_dir / FOLDER).iterdir())) == 1, "half-written files use up the disk"
        (disk / "filler").unlink()
        assert run_to_end(2, arguments, output) == [0, 0]
        final = published_tensors(run_dir, STEPS)
        assert all(torch.equal(final[name], left_alone[0][name]) for name in final)
        assert sorted(path.name for path in (run_dir / FOLDER).iterdir()) == [f"step-{STEPS:08d}"]


@needs_mount
def test_a_read_only_folder_is_refused_before_anything_starts(data: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=6m,ro") as disk:
        output = tmp_path / "out.txt"
        assert run_to_end(1, [write_config(data, disk / "run", tmp_path, cp=1)], output) == [2]
        assert output.read_text() == (
            f"error: output_dir {disk / 'run'}: no permission to write in {disk}; choose another\n"
        )


@needs_mount
def test_checkpoints_that_become_read_only_end_the_run(data: Path, tmp_path: Path) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "out.txt"
    with small_disk(run_dir / FOLDER, "size=6m,ro"):
        assert run_to_end(2, [write_config(data, run_dir, tmp_path)], output) == [1, 1]
    assert "error: the last 3 checkpoints could not be written: rank 0: [Errno 30] Read-only" in output.read_text()
    assert list((run_dir / FOLDER).iterdir()) == []
    assert len(read_metrics(run_dir)) == 8  # the fourth save is due after step 8


def test_a_folder_that_is_removed_ends_the_run_and_stays_away(data: Path, tmp_path: Path) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "out.txt"
    run = ForkedRun(2, [write_config(data, run_dir, tmp_path)], output)
    until(lambda: len(published(run_dir)) > 0, 60, lambda: "no checkpoint", every=0.002)
    while run_dir.exists():
        shutil.rmtree(run_dir, ignore_errors=True)
    assert run.wait() == [1, 1]
    assert "error: the last 3 checkpoints could not be written: rank 0: [Errno 2] No such file" in output.read_text()
    assert not run_dir.exists()
