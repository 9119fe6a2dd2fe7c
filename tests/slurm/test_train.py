"""Training as jobs: what the same run computes without Slurm, whatever happens to the job."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lhcp import __version__
from lhcp.launch import jobs, submit
from lhcp.launch.prepare import prepare
from lhcp.lock import locked
from lhcp.progress import read_starts
from slurm.cluster import Cluster
from slurm.runs_on_slurm import STEPS, Runs, losses, wait_for_step
from waiting import until

pytestmark = pytest.mark.usefixtures("login")
RANK = r"^\S+ -u -m lhcp\.train "
"""Command line of a rank; that of torchrun has more before."""


def start(runs: Runs, name: str, nodes: int = 2, **changes: object) -> tuple[str, Path]:
    """Submit by sbatch: the job's number and the run folder."""
    (job,) = submit.by_sbatch(prepare(runs.request(name, nodes, **changes)))
    return job.job_id, runs.folder / name


def test_a_run_on_two_nodes(runs: Runs, cluster: Cluster, tmp_path: Path) -> None:
    """As that of 1M tokens: the ranks of a node share a sequence, and each node has its own."""
    prolog = tmp_path / "prolog"
    prolog.write_text("#!/bin/sh\necho print welcome\n")
    prolog.chmod(0o755)
    cluster.reconfigure(TaskProlog=prolog)
    job, run_dir = start(runs, "two-nodes", dp=2)
    shown = cluster.wait(job, {"COMPLETED", "FAILED"}, 300)
    assert shown["JobState"] == "COMPLETED"
    assert (shown["NumNodes"], shown["TresPerNode"]) == ("2", "gres:gpu:b200:2")
    assert losses(run_dir) == runs.losses_alone(dp=2)


def test_told_to_stop_before_the_limit(runs: Runs, cluster: Cluster, expected: list[float]) -> None:
    cluster.reconfigure(KillOnBadExit=1)
    job, run_dir = start(runs, "told")
    wait_for_step(run_dir, 23)
    cluster.run("scancel", "--signal=USR1", job)
    shown = cluster.wait(job, {"COMPLETED", "FAILED"})
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1")
    assert losses(run_dir) == expected
    # The site's default did not end the other node when the first had saved.
    assert "Terminating StepId" not in (run_dir / "jobs/001" / f"slurm-{job}.out").read_text()


def test_requeued_in_mid_step(runs: Runs, cluster: Cluster, expected: list[float]) -> None:
    request = runs.request("requeued")
    held = dataclasses.replace(request, options={**request.options, "hold": None})
    (submitted,) = submit.by_sbatch(prepare(held))
    job, run_dir = submitted.job_id, runs.folder / "requeued"
    copy = run_dir / "code/lhcp/__init__.py"
    copy.write_text(copy.read_text().replace(__version__, "of the copy"))
    cluster.run("scontrol", "release", job)
    wait_for_step(run_dir, 23)
    cluster.run("scontrol", "requeue", job)
    shown = cluster.wait(job, {"COMPLETED", "FAILED"})
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1")
    assert losses(run_dir) == expected
    assert [begun["lhcp"] for begun in read_starts(run_dir)] == ["of the copy", "of the copy"]


def test_preempted(runs: Runs, cluster: Cluster, expected: list[float], tmp_path: Path) -> None:
    """With a time of grace, at whose start Slurm sends SIGTERM to the steps alone."""
    job, run_dir = start(runs, "preempted")
    wait_for_step(run_dir, 23)
    options = ("--partition=gpu", "--nodes=4", "--exclusive", f"--output={tmp_path}/out")
    urgent = cluster.run("sbatch", "--parsable", *options, "--wrap=sleep 1").strip()
    cluster.wait(urgent, {"COMPLETED", "FAILED"})
    shown = cluster.wait(job, {"COMPLETED", "FAILED"}, 300)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1")
    assert losses(run_dir) == expected
    log = (run_dir / "jobs/001" / f"slurm-{job}.out").read_text()
    assert "stopped by SIGTERM after step" in log


def test_told_to_stop_before_anything_listens(runs: Runs, cluster: Cluster) -> None:
    run_dir = runs.folder / "early"
    prepared = prepare(runs.request("early"))
    run_dir.mkdir()
    with locked(run_dir):
        (submitted,) = submit.by_sbatch(prepared)
        job, log = submitted.job_id, submitted.log
        until(lambda: log.exists() and "waiting up to" in log.read_text(), 60, lambda: "nobody waits for the lock")
        cluster.run("scancel", "--signal=TERM", job)
        until(lambda: cluster.job(job)["Restarts"] == "1", 60, log.read_text)
    assert cluster.wait(job, {"RUNNING", "COMPLETED", "FAILED", "CANCELLED"})["JobState"] == "RUNNING"
    wait_for_step(run_dir, 0)


def test_a_node_loses_power(runs: Runs, cluster: Cluster, expected: list[float]) -> None:
    job, run_dir = start(runs, "power")
    wait_for_step(run_dir, 23)
    cluster.crash("n2")
    shown = cluster.wait(job, {"COMPLETED", "FAILED"}, 300)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1")
    assert "n2" not in shown["NodeList"]
    assert losses(run_dir) == expected


def test_a_rank_is_killed(runs: Runs, cluster: Cluster, expected: list[float]) -> None:
    job, run_dir = start(runs, "killed")
    wait_for_step(run_dir, 23)
    (rank,) = cluster.pids("n2", RANK)
    os.kill(rank, signal.SIGKILL)
    shown = cluster.wait(job, {"COMPLETED", "FAILED"})
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "0")
    assert losses(run_dir) == expected


def test_a_rank_is_stopped(runs: Runs, cluster: Cluster, expected: list[float]) -> None:
    job, run_dir = start(runs, "stopped", hang_timeout_s=7)
    wait_for_step(run_dir, 23)
    (rank,) = cluster.pids("n2", RANK)
    os.kill(rank, signal.SIGSTOP)
    shown = cluster.wait(job, {"COMPLETED", "FAILED"}, 300)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "0")
    assert losses(run_dir) == expected
    log = (run_dir / "jobs/001" / f"slurm-{job}.out").read_text()
    assert re.search(
        r"error: no progress for 7 s: rank 1 on host n2 gives no sign of life since \S+, when it was in step", log
    )
    # Which collective of a step it waits in depends on how far the other came.
    stacks = (run_dir / "logs/hang-rank-00000.txt").read_text()
    assert re.search(r'lhcp/run\.py", line \d+ in run$', stacks, re.MULTILINE), stacks


def test_a_crash_loop_ends(runs: Runs, cluster: Cluster) -> None:
    # Diverges: no step after the first is finite, and none may be skipped.
    job, run_dir = start(runs, "loop", optim={"lr": 1e30, "warmup_steps": 0, "max_skipped_steps": 0})
    shown = cluster.wait(job, {"COMPLETED", "FAILED"}, 300)
    log = (run_dir / "jobs/001" / f"slurm-{job}.out").read_text()
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", "1:0")
    # Tried again in place once, then requeued, then no more.
    assert shown["Restarts"] == "1"
    assert log.count("so training has diverged") == 3
    assert f"error: step 2 of {2 * STEPS} failed 3 times in a row, with no new checkpoint between" in log
    # A job that waited behind it, as in a chain, is refused at once; somebody's own submission is not.
    waited = cluster.run("sbatch", "--parsable", str(run_dir / "jobs/001/job.sbatch")).strip()
    assert cluster.wait(waited, {"COMPLETED", "FAILED"})["ExitCode"] == "1:0"
    assert "diverged" not in (run_dir / "jobs/001" / f"slurm-{waited}.out").read_text()


def test_cancelled_and_submitted_again(runs: Runs, cluster: Cluster, expected: list[float]) -> None:
    job, run_dir = start(runs, "cancelled")
    wait_for_step(run_dir, 13)
    (told,) = jobs.cancel(run_dir)
    assert told.job_id == job
    shown = cluster.wait(job, {"COMPLETED", "FAILED"})
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "75:0", "0")
    steps = len(losses(run_dir))
    assert (run_dir / f"checkpoints/step-{steps:08d}").is_dir()
    (again,) = submit.again(run_dir)
    assert cluster.wait(again.job_id, {"COMPLETED", "FAILED"})["JobState"] == "COMPLETED"
    assert losses(run_dir) == expected


def test_scancel_is_the_end(runs: Runs, cluster: Cluster) -> None:
    job, run_dir = start(runs, "scancel")
    wait_for_step(run_dir, 13)
    cluster.run("scancel", job)
    shown = cluster.wait(job, {"CANCELLED", "COMPLETED", "FAILED"})
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0")
    assert (run_dir / f"checkpoints/step-{len(losses(run_dir)):08d}").is_dir()
    assert "requeue" not in (run_dir / "jobs/001" / f"slurm-{job}.out").read_text()


def test_two_stages_as_two_jobs_by_submitit(runs: Runs, cluster: Cluster, expected: list[float]) -> None:
    first_stage = [{"mode": "lighthouse", "steps": STEPS}]
    (first,) = submit.by_submitit(prepare(runs.request("stages", stages=first_stage)))
    both = dataclasses.replace(runs.request("stages"), resume=True)
    (second,) = submit.by_submitit(prepare(both), after=first.job_id)
    assert cluster.job(second.job_id)["Dependency"] == f"afterany:{first.job_id}(unfulfilled)"
    assert (first.result(), second.result()) == (0, 0)
    assert losses(runs.folder / "stages") == expected
    assert f"resumed from {runs.folder}/stages/checkpoints/step-{STEPS:08d}" in second.stdout()


def test_a_chain_where_nothing_is_requeued(runs: Runs, cluster: Cluster, expected: list[float]) -> None:
    cluster.reconfigure(JobRequeue=0)
    request = runs.request("chain")
    forbidden = dataclasses.replace(request, options={**request.options, "no-requeue": None})
    chain = submit.by_sbatch(prepare(forbidden), chain=3)
    run_dir = runs.folder / "chain"
    wait_for_step(run_dir, 23)
    assert [cluster.job(job.job_id)["JobState"] for job in chain] == ["RUNNING", "PENDING", "PENDING"]
    cluster.run("scancel", "--signal=USR1", chain[0].job_id)
    ends = [cluster.wait(job.job_id, {"COMPLETED", "FAILED"})["ExitCode"] for job in chain]
    assert ends == ["75:0", "0:0", "0:0"]
    assert losses(run_dir) == expected
    # The third found it finished, and began nothing.
    assert chain[2].log.with_name(f"slurm-{chain[2].job_id}.out").read_text().count("is finished") == 1
    assert len(read_starts(run_dir)) == 2


def test_the_time_limit(runs: Runs, cluster: Cluster, expected: list[float]) -> None:
    request = runs.request("limit", checkpoint={"every": 10, "stop_timeout_s": 9})
    limits = {"time": "1", "signal": "USR1@10"}
    (job,) = submit.by_sbatch(prepare(dataclasses.replace(request, options={**request.options, **limits})))
    wait_for_step(runs.folder / "limit", 23)
    ranks = [pid for node in ("n1", "n2", "n3", "n4") for pid in cluster.pids(node, RANK)]
    assert len(ranks) == 2
    for rank in ranks:  # where they are, rather than train for a minute; Slurm lets them go on when it tells them
        os.kill(rank, signal.SIGSTOP)
    shown = cluster.wait(job.job_id, {"COMPLETED", "FAILED", "TIMEOUT"}, 300)
    assert (shown["JobState"], shown["TimeLimit"]) == ("COMPLETED", "00:01:00")
    assert int(shown["Restarts"]) >= 1  # a slow machine meets the limit again
    assert losses(runs.folder / "limit") == expected
    assert "stopped by SIGUSR1 after step" in (runs.folder / "limit/jobs/001" / f"slurm-{job.job_id}.out").read_text()


def test_torchrun_on_two_machines(runs: Runs, cluster: Cluster, expected: list[float]) -> None:
    config = runs.config("machines")
    printed = subprocess.run(
        [Path(sys.executable).with_name("lhcp"), "launch", "torchrun", str(config), "--nodes=2", "--gpus-per-node=1",
         "--head=n1:9531"], capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda node: cluster.execute(node, "env", *shlex.split(printed)), ("n1", "n2")))
    assert losses(runs.folder / "machines") == expected
