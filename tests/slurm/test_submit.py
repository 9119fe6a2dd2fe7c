"""What is submitted, behind what, and what is said of it afterwards. Nothing is trained."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lhcp.cli import app
from lhcp.config import ConfigError
from lhcp.launch import jobs, submit
from lhcp.launch.prepare import Prepared, Request, prepare
from slurm.cluster import Cluster
from slurm.runs_on_slurm import SITE, Runs
from waiting import until

pytestmark = pytest.mark.usefixtures("login")
ENDED = {"COMPLETED", "FAILED", "CANCELLED"}
TEMPLATE = """\
#!/usr/bin/env bash
# Does what it is told.
#LHCP needs=nothing trains=no
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --time=0:10:00

set -euo pipefail
"""


def held(runs: Runs, name: str, **options: str | None) -> Prepared:
    """A run that stays in the queue."""
    request = runs.request(name)
    options = {**request.options, "hold": None, **options}
    return prepare(dataclasses.replace(request, options=options))


def told(folder: Path, does: str, **site: object) -> Prepared:
    """A job that runs these shell lines."""
    folder.mkdir(exist_ok=True)
    path = folder / "told.sbatch"
    path.write_text(TEMPLATE + does + "\n")
    return prepare(Request(template=str(path), out=folder / "out", site=SITE.model_copy(update=site)))


@pytest.mark.parametrize("way", [submit.by_sbatch, submit.by_submitit])
def test_variables_of_the_caller_change_nothing(
    runs: Runs, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, way: object
) -> None:
    variables = {"SBATCH_TIMELIMIT": "7", "SBATCH_NO_REQUEUE": "1", "SLURM_ARRAY_TASK_ID": "3", "SQUEUE_STATES": "F"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (job,) = way(held(runs, f"variables {way.__name__}"))
    shown = cluster.job(job.job_id)
    assert (shown["TimeLimit"], shown["Requeue"]) == ("1-00:00:00", "1")
    assert [state.job_id for state in jobs.states(jobs.submitted(runs.folder / f"variables {way.__name__}"))] == [
        job.job_id
    ]


def test_behind_what(runs: Runs, cluster: Cluster, tmp_path: Path) -> None:
    out = runs.folder / "behind"
    first = submit.by_sbatch(held(runs, "behind"))[0].job_id
    again = dataclasses.replace(runs.request("behind"), resume=True)
    other = submit.by_sbatch(told(tmp_path, "sleep 100"))[0].job_id
    for after, message in {
        None: rf"job {first} of {out} is pending still; submit this one behind it with --after {first}",
        other: rf"job {first} of {out} is pending still; submit this one behind it with --after {first}",
        "987654": "--after 987654: Slurm does not know that job",
        "x": "--after: given 'x', must be the number of a job",
    }.items():
        for way in (submit.by_sbatch, submit.by_submitit):
            with pytest.raises(ConfigError, match=message):
                way(prepare(again), after)
        with pytest.raises(ConfigError, match=message):
            submit.again(out, after)
    assert [job.job_id for job in jobs.submitted(out)] == [first]
    # One of the same run that was told to end has failed, and goes on all the same; another must have succeeded.
    second = submit.again(out, first)[0].job_id
    assert cluster.job(second)["Dependency"] == f"afterany:{first}(unfulfilled)"
    with pytest.raises(ConfigError, match=f"--after {second}"):
        submit.again(out, first)
    (third,) = submit.by_sbatch(held(runs, "behind another"), other)
    shown = cluster.job(third.job_id)
    assert (shown["Dependency"], shown["KillOInInvalidDependent"]) == (f"afterok:{other}(unfulfilled)", "Yes")


def test_a_chain_has_a_name_of_its_own(runs: Runs, cluster: Cluster) -> None:
    one, two = submit.by_sbatch(held(runs, "named"), chain=2)
    shown = [cluster.job(job.job_id) for job in (one, two)]
    assert shown[0]["JobName"] == shown[1]["JobName"] != "named"
    assert shown[1]["Dependency"].startswith("singleton")
    for options in ({"chain": 2}, {"after": one.job_id}):
        with pytest.raises(ConfigError, match="--sbatch dependency: leave it out"):
            submit.by_sbatch(held(runs, "own", dependency=f"afterany:{one.job_id}"), **options)
    assert not (runs.folder / "own").exists()
    (own,) = submit.by_sbatch(held(runs, "own", dependency=f"afterany:{one.job_id}"))
    assert cluster.job(own.job_id)["Dependency"] == f"afterany:{one.job_id}(unfulfilled)"


@pytest.mark.parametrize("way", [submit.by_sbatch, submit.by_submitit])
def test_a_job_that_cannot_be_noted_is_taken_back(
    runs: Runs, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, way: object
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    prepared = held(runs, f"full {way.__name__}")
    monkeypatch.setattr(jobs, "remember", full)
    with pytest.raises(ConfigError, match=r"job \d+ is taken back, since .* No space left on device"):
        way(prepared)
    assert cluster.run("squeue", "--noheader") == ""
    assert not prepared.out.exists()


def test_following_ends_with_the_code_of_the_job(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(f"partition: main\ngpus: '{SITE.gpus}'\n")
    (tmp_path / "told.sbatch").write_text(TEMPLATE + "echo here; exit ${CODE-3}\n")
    arguments = ["launch", "sbatch", str(tmp_path / "told.sbatch"), "--site", str(tmp_path / "site.yaml")]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "failed"), "--follow"])
    assert done.exit_code == 3
    assert done.stdout.endswith("here\n")
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "good"), "--follow"], env={"CODE": "0"})
    assert done.exit_code == 0
    for name, end in (("failed", "failed with exit code 3"), ("good", "completed")):
        log = CliRunner().invoke(app, ["logs", str(tmp_path / name)])
        assert (log.exit_code, log.stdout) == (0, "here\n")
        status = CliRunner().invoke(app, ["status", str(tmp_path / name)])
        assert status.stdout.rstrip().endswith(f": {end}")


def test_what_submitit_says_of_a_failure(cluster: Cluster, tmp_path: Path) -> None:
    from submitit.core.utils import FailedJobError

    (job,) = submit.by_submitit(told(tmp_path, "echo this is why >&2; exit 4"))
    with pytest.raises(FailedJobError, match="returned non-zero exit status 4"):
        job.result()
    assert cluster.wait(job.job_id, ENDED)["ExitCode"] == "1:0"
    assert job.stdout().rstrip().endswith("this is why")


def test_a_line_of_setup_that_fails(cluster: Cluster, tmp_path: Path) -> None:
    passing = tmp_path / "passing.sh"
    passing.write_text("false\nfor x in 1 2; do false; done\nexport SOURCED=yes\n")
    lines = [f". {passing}", "[ -d /nowhere ] && true", "export A=1; false || true", "for x in 1 2; do", "true", "done"]
    (job,) = submit.by_sbatch(told(tmp_path, 'echo "sourced: $SOURCED"; false', setup=lines))
    assert cluster.wait(job.job_id, ENDED)["ExitCode"] == "1:0"
    assert job.log.read_text() == "sourced: yes\n"
    (job,) = submit.by_sbatch(told(tmp_path / "two", "echo here", setup=["module load cuda"]))
    assert cluster.wait(job.job_id, ENDED)["ExitCode"] == "1:0"
    assert job.log.read_text().splitlines()[-1] == "error: setup of the site file failed: module load cuda"


def test_the_controller_is_away(cluster: Cluster, tmp_path: Path) -> None:
    """When a run has ended there, its job waits to be requeued."""
    does = """
. "$LHCP_OUT/code/lhcp/slurm/lib/nodes.sh"
if [ -n "${SLURM_RESTART_COUNT:-}" ]; then echo again; exit; fi
until [ -e away ]; do sleep 0.1; done
until_slurm_answers
scontrol requeue "$SLURM_JOB_ID"
"""
    (job,) = submit.by_sbatch(told(tmp_path, does))
    cluster.wait(job.job_id, "RUNNING")
    with cluster.controller_away():
        (job.folder / "away").touch()
        until(lambda: job.log.exists() and "controller does not answer" in job.log.read_text(), 60, job.log.read_text)
    shown = cluster.wait(job.job_id, {"COMPLETED", "FAILED"})
    assert (shown["JobState"], shown["Restarts"], job.log.read_text()) == ("COMPLETED", "1", "again\n")


def test_elements_of_an_array(runs: Runs, cluster: Cluster, tmp_path: Path) -> None:
    template = TEMPLATE.replace("nothing", "grid") + "echo element $SLURM_ARRAY_TASK_ID; exit $SLURM_ARRAY_TASK_ID\n"
    (tmp_path / "told.sbatch").write_text(template)
    (tmp_path / "grid.yaml").write_text(f"config: {runs.config('elements')}\nvary: {{seed: [1, 2, 3]}}\n")
    request = Request(
        template=str(tmp_path / "told.sbatch"), config=tmp_path / "grid.yaml", out=tmp_path / "out", site=SITE,
        overrides=["parallel.dp=null", "parallel.cp=1"],
    )  # fmt: skip
    for way in (submit.by_sbatch, submit.by_submitit):
        way(prepare(request))
        job = jobs.submitted(tmp_path / "out")[-1]
        assert [cluster.wait(f"{job.job_id}_{number}", ENDED)["JobState"] for number in range(3)] == [
            "COMPLETED", "FAILED", "FAILED",
        ]  # fmt: skip
        assert [end.code for end in jobs.ends(job)] == ([0, 1, 2] if way is submit.by_sbatch else [0, 1, 1])
        for number in range(3):
            log = CliRunner().invoke(app, ["logs", str(tmp_path / "out"), "--element", str(number)])
            assert f"element {number}\n" in log.stdout
        status = CliRunner().invoke(app, ["status", str(tmp_path / "out")])
        assert f"job {job.job_id}, an array of 3" in status.stdout
        assert "    0  seed=1  completed; its log: lhcp logs" in status.stdout
        code = 2 if way is submit.by_sbatch else 1
        assert f"    2  seed=3  failed with exit code {code}; its log: lhcp logs" in status.stdout
        request = dataclasses.replace(request, resume=True)
    wrong = CliRunner().invoke(app, ["logs", str(tmp_path / "out"), "--element", "3"])
    assert isinstance(wrong.exception, ConfigError)


def test_status_of_a_run_whose_jobs_are_gone(runs: Runs, cluster: Cluster) -> None:
    (job,) = submit.by_sbatch(held(runs, "gone"))
    shown = CliRunner().invoke(app, ["status", str(runs.folder / "gone")]).stdout
    assert ": waiting to start" in shown
    assert f"{job.job_id} pending (JobHeldUser)" in shown
    cluster.run("scancel", job.job_id)
    shown = CliRunner().invoke(app, ["status", str(runs.folder / "gone")]).stdout
    assert ": stopped" in shown
    end = f"{job.job_id} cancelled (JobHeldUser)"
    assert f"none waits or runs; the last, {end}; its log: lhcp logs {runs.folder}/gone" in shown
    log = CliRunner().invoke(app, ["logs", str(runs.folder / "gone")])
    assert str(log.exception) == f"job {job.job_id} left no log {job.log}: it is cancelled (JobHeldUser)"


@pytest.mark.parametrize("way", [submit.by_sbatch, submit.by_submitit])
def test_a_job_that_shall_not_be_requeued(runs: Runs, cluster: Cluster, way: object) -> None:
    (job,) = way(held(runs, f"once {way.__name__}", **{"no-requeue": None}))
    assert cluster.job(job.job_id)["Requeue"] == "0"
