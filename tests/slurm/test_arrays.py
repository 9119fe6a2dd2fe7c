"""Job arrays and the other programs, on real nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lhcp.launch import submit
from lhcp.launch.jobs import Job
from lhcp.launch.prepare import Request, prepare
from slurm.cluster import Cluster
from slurm.runs_on_slurm import SITE, Runs, losses, wait_for_step
from waiting import until

pytestmark = pytest.mark.usefixtures("login")
REPOSITORY = Path(__file__).parents[2]
ENDED = {"COMPLETED", "FAILED", "CANCELLED"}


def report(program: str, job: Job) -> subprocess.CompletedProcess[str]:
    """Merge the results of an array."""
    folder = job.folder.parents[1]
    expect = ["--expect", str(job.folder / "elements.txt")]
    command = [sys.executable, "-m", f"benchmarks.{program}", "report", str(folder), *expect]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_a_sweep_with_an_element_that_failed(runs: Runs, cluster: Cluster, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    arms = "{short: {}, long: {seq_len: 720}}"
    grid.write_text(f"config: {runs.config('base')}\narms: {arms}\nvary: {{parallel.cp: [1, 2]}}\n")
    request = Request(
        template="sweep",
        config=grid,
        overrides=["parallel.dp=null", "global_batch_size=2", "compute_dtype=float64"],
        out=tmp_path / "sweep",
        options={"gpus-per-node": "2"},
        site=SITE,
    )
    (job,) = submit.by_sbatch(prepare(request))
    assert job.elements == 4
    cluster.run("scancel", f"{job.job_id}_3")
    states = [cluster.wait(f"{job.job_id}_{element}", ENDED, 300)["JobState"] for element in range(3)]
    assert states == ["COMPLETED", "COMPLETED", "COMPLETED"]
    merged = report("scaling", job)
    assert merged.returncode == 1
    assert "- long,cp=2: no result: see its log" in merged.stdout
    for name, seq_len, cp in (("short,cp=1", 360, 1), ("short,cp=2", 360, 2), ("long,cp=1", 720, 1)):
        result = json.loads((tmp_path / "sweep" / f"{name}.json").read_text())
        assert (result["config"]["seq_len"], result["config"]["cp"]) == (seq_len, cp)
        assert f"| {name} " in merged.stdout
    # It is done by itself, and then nothing is missing.
    again = cluster.run("sbatch", "--parsable", "--array=3", str(job.folder / "job.sbatch")).strip()
    assert cluster.wait(f"{again}_3", ENDED)["JobState"] == "COMPLETED"
    assert report("scaling", job).returncode == 0


def test_runs_of_a_grid_through_submitit(runs: Runs, cluster: Cluster, tmp_path: Path) -> None:
    grid = tmp_path / "grid.yaml"
    arms = "{dense: {stages: [{mode: dense, steps: 8}]}, sparse: {stages: [{mode: lighthouse, steps: 4}, " \
           "{mode: dense, steps: 4}]}}"  # fmt: skip
    grid.write_text(f"config: {runs.config('arms')}\narms: {arms}\n")
    done = submit.job(
        grid,
        template="recoverability",
        out=tmp_path / "arms",
        options={"gpus-per-node": "2", "signal": "USR1@25"},
        site=SITE,
    )
    assert [job.result() for job in done] == [0, 0]
    for arm in ("dense", "sparse"):
        assert len(losses(tmp_path / "arms" / arm)) == 8
    (recorded,) = submit.jobs.submitted(tmp_path / "arms")
    merged = report("recoverability", recorded)
    assert merged.returncode == 0, merged.stderr
    assert "4 lighthouse, 4 dense" in merged.stdout


def test_one_arm_goes_on_alone(runs: Runs, cluster: Cluster, tmp_path: Path) -> None:
    """The job id of the last element to start is that of the whole array."""
    grid = tmp_path / "grid.yaml"
    grid.write_text(f"config: {runs.config('alone-arms')}\nvary: {{seed: [1, 2]}}\n")
    options = {"gpus-per-node": "2", "signal": "USR1@25"}
    request = Request(template="recoverability", config=grid, out=tmp_path / "arms", options=options, site=SITE)
    (job,) = submit.by_sbatch(prepare(request))
    wait_for_step(tmp_path / "arms/seed=2", 3)
    cluster.run("scancel", f"{job.job_id}_0")
    assert cluster.job(f"{job.job_id}_1")["JobId"] == job.job_id
    cluster.run("scancel", "--signal=USR1", f"{job.job_id}_1")
    log = job.log_of(1)
    until(lambda: cluster.job(f"{job.job_id}_1")["Restarts"] == "1", 60, log.read_text)
    assert cluster.wait(f"{job.job_id}_1", {"RUNNING", *ENDED})["JobState"] == "RUNNING"
    until(lambda: "resumed from" in log.read_text(), 60, log.read_text)
    other = cluster.job(f"{job.job_id}_0")
    assert (other["JobState"], other["Restarts"]) == ("CANCELLED", "0")


def test_preflight(cluster: Cluster, tmp_path: Path) -> None:
    request = Request(template="preflight", out=tmp_path / "pre", options={"gpus-per-node": "1"}, site=SITE)
    (job,) = submit.by_sbatch(prepare(request))
    shown = cluster.wait(job.job_id, ENDED, 300)
    found = json.loads((tmp_path / "pre/preflight.json").read_text())
    assert sorted(found["nodes"]) == ["n1", "n2", "n3", "n4"]
    assert len(found["pairs"]) == 6
    # On two cores that four nodes share, any may look slow; what is said of them must be what is in the file.
    assert shown["ExitCode"] == ("1:0" if found["exclude"] else "0:0")
    log = job.log.read_text()
    assert (f"--exclude={','.join(found['exclude'])}" if found["exclude"] else "no bad node among 4") in log


def test_latency(runs: Runs, cluster: Cluster, tmp_path: Path) -> None:
    overrides = ["parallel.cp=1", "parallel.dp=null", "eval.sequences=0"]
    request = Request(
        template="latency", config=runs.config("latency"), overrides=overrides, out=tmp_path / "out", site=SITE
    )
    (job,) = submit.by_sbatch(prepare(request))
    assert cluster.wait(job.job_id, ENDED)["JobState"] == "COMPLETED"
    assert "dense / lighthouse" in job.log.read_text()
