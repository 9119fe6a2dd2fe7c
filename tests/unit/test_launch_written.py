"""What a submission writes: numbers, absolute paths, the copy of the code, the elements of a grid, options."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

import lhcp
from golden.update import write_inputs
from job_records import job_record
from lhcp import config_file
from lhcp.config import ConfigError
from lhcp.files import write_checked
from lhcp.launch import jobs, submit
from lhcp.launch.jobs import Job
from lhcp.launch.prepare import Prepared, Request, prepare
from lhcp.launch.site import Container, Site
from saved_models import make_manifest

TRAIN_98K: dict[str, str | None] = {
    "nodes": "1", "ntasks-per-node": "1", "gpus-per-node": "8", "exclusive": None, "mem": "0", "time": "24:00:00",
    "signal": "USR1@660", "requeue": None, "open-mode": "append",
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with data and configurations/run.yaml."""
    (tmp_path / "data").symlink_to(inputs / "data")
    run = yaml.safe_load((inputs / "run.yaml").read_text()) | {"output_dir": "run", "data": {"path": "data"}}
    (tmp_path / "configurations").mkdir()
    (tmp_path / "configurations" / "run.yaml").write_text(yaml.safe_dump(run))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_request(**changes: Any) -> Request:
    return Request(template="train_98k", config=Path("configurations/run.yaml"), **changes)


def grid_request(folder: Path, template: str = "recoverability", **grid: Any) -> Request:
    values = {"config": "configurations/run.yaml"} | grid
    (folder / "grid.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return Request(template=template, config=Path("grid.yaml"), out=Path("out"))


def test_a_run(folder: Path) -> None:
    job = prepare(run_request(overrides=["seed=3"]))
    assert sorted(path.name for path in folder.iterdir()) == ["configurations", "data"]
    out = folder / "run"
    assert (job.out, job.folder, job.name, job.elements) == (out, out / "jobs" / "001", "run", None)
    assert job.script == out / "jobs" / "001" / "job.sbatch"
    job.write()
    assert sorted(path.name for path in out.iterdir()) == ["code", "jobs"]
    assert sorted(path.name for path in job.folder.iterdir()) == ["config.yaml", "job.sbatch"]
    assert job.script.read_text() == job.text
    assert os.access(job.script, os.X_OK)
    written = config_file.load(job.folder / "config.yaml")
    given = config_file.load(Path("configurations/run.yaml"))
    data = given.data.model_copy(update={"path": folder / "data"})
    assert written == given.model_copy(update={"seed": 3, "output_dir": out, "data": data})
    assert written.parallel.dp is None  # follows from the GPUs of the job


@pytest.mark.parametrize("out", ["elsewhere", "./elsewhere/", "{here}/elsewhere"])
def test_paths_are_absolute(folder: Path, out: str) -> None:
    job = prepare(run_request(out=Path(out.format(here=folder))))
    assert job.out == folder / "elsewhere"
    written = yaml.safe_load(job.files["config.yaml"])
    assert (written["output_dir"], written["data"]["path"]) == (str(folder / "elsewhere"), str(folder / "data"))


def test_the_checkpoint_to_start_from_is_absolute_and_mounted(folder: Path) -> None:
    model = config_file.load(Path("configurations/run.yaml")).model
    (folder / "start").mkdir()
    write_checked(folder / "start" / "manifest.json", make_manifest(model).model_dump_json())
    site = Site(container=Container(runtime="pyxis", image="torch"))
    job = prepare(run_request(overrides=["model={init_from: start}"], site=site))
    assert yaml.safe_load(job.files["config.yaml"])["model"]["init_from"] == str(folder / "start")
    mounts = ",".join(f"{path}:{path}" for path in (folder / "run", folder / "data", folder / "start"))
    assert f"'--container-mounts={mounts}') " in job.text


def test_submissions_are_numbered(folder: Path) -> None:
    names = []
    for _ in range(3):
        job = prepare(run_request(resume=True))
        job.write()
        names.append(job.folder.name)
    assert names == ["001", "002", "003"]
    (folder / "run" / "jobs" / "1000").mkdir()
    (folder / "run" / "jobs" / "notes").mkdir()
    assert jobs.numbers(folder / "run") == [1, 2, 3, 1000]
    assert prepare(run_request(resume=True)).folder.name == "1001"
    with pytest.raises(FileExistsError):  # another one was faster
        job.write()


def test_the_copy_of_the_code_runs(folder: Path) -> None:
    job = prepare(run_request())
    job.write()
    code = folder / "run" / "code"
    package = Path(lhcp.__file__).parent
    for file in ("train.py", "launch/verdict.py", "slurm/lib/train.sh", "kernels/lighthouse/reference.py"):
        assert (code / "lhcp" / file).read_bytes() == (package / file).read_bytes(), file
    assert not any(path.is_symlink() or path.name == "__pycache__" for path in code.rglob("*"))
    assert {path.name for path in code.iterdir()} <= {"lhcp", "benchmarks"}
    program = "import lhcp.launch.verdict as v; print(v.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(code)}, capture_output=True, text=True
    )
    assert done.stdout == f"{code}/lhcp/launch/verdict.py\n"
    (code / "lhcp" / "train.py").write_text("kept")
    prepare(run_request(resume=True)).write()
    assert (code / "lhcp" / "train.py").read_text() == "kept"


def test_a_grid(folder: Path) -> None:
    stages = [{"mode": "dense", "steps": 5}]
    arms = {"dense": {"stages": stages, "seed": 1}, "12k+4k": {}}
    job = prepare(grid_request(folder, arms=arms, vary={"parallel.cp": [1, 2], "optim.lr": [0.001]}))
    names = ["dense,cp=1,lr=0.001", "dense,cp=2,lr=0.001", "12k+4k,cp=1,lr=0.001", "12k+4k,cp=2,lr=0.001"]
    assert (job.elements, job.options["array"], job.name) == (4, "0-3%4", "out")
    assert job.options["output"] == f"{folder}/out/jobs/001/slurm-%A_%a.out"
    job.write()
    configs = [f"config-{i}.yaml" for i in range(4)]
    assert sorted(path.name for path in job.folder.iterdir()) == [*configs, "elements.txt", "job.sbatch"]
    assert (job.folder / "elements.txt").read_text() == "".join(f"{name}\n" for name in names)
    written = [config_file.load(job.folder / name) for name in configs]
    assert [config.output_dir for config in written] == [folder / "out" / name for name in names]
    assert [config.parallel.cp for config in written] == [1, 2, 1, 2]
    assert [config.seed for config in written] == [1, 1, 0, 0]
    assert [len(config.stages) for config in written] == [1, 1, 2, 2]
    assert {config.optim.lr for config in written} == {0.001}
    assert {config.data.path for config in written} == {folder / "data"}


def test_overrides_of_the_command_line_go_under_those_of_the_grid(folder: Path) -> None:
    request = grid_request(folder, arms={"a": {"seed": 1}, "b": {}})
    request = Request(**(request.__dict__ | {"overrides": ["seed=7", "optim.lr=0.5"]}))
    files = prepare(request).files
    values = [yaml.safe_load(files[f"config-{i}.yaml"]) for i in range(2)]
    assert [(value["seed"], value["optim"]["lr"]) for value in values] == [(1, 0.5), (7, 0.5)]


def test_options_of_the_user_go_before_those_of_the_site_and_the_template(folder: Path) -> None:
    out = str(folder / "run" / "jobs" / "001")
    written = {"output": f"{out}/slurm-%j.out", "chdir": out}
    assert prepare(run_request()).options == {"job-name": "run"} | TRAIN_98K | written
    site = Site(partition="b200", sbatch={"mem": "100G", "time": "8:00:00", "mail-user": "a@example.org"})
    of_site = {"partition": "b200", "mem": "100G", "time": "8:00:00", "mail-user": "a@example.org"}
    assert prepare(run_request(site=site)).options == {"job-name": "run"} | TRAIN_98K | of_site | written
    options = {"time": "2:00:00", "partition": "debug", "job-name": "named", "nice": None, "nodes": "2"}
    assert prepare(run_request(site=site, options=options)).options == TRAIN_98K | of_site | options | written


@pytest.mark.parametrize(
    ("style", "name", "value"),
    [
        ("--gpus-per-node={n}", "gpus-per-node", "4"),
        ("--gres=gpu:{n}", "gres", "gpu:4"),
        ("--gres=gpu:b200:{n}", "gres", "gpu:b200:4"),
        ("--gpus-per-task={n}", "gpus-per-task", "4"),
    ],
)
def test_how_gpus_are_asked_for(folder: Path, style: str, name: str, value: str) -> None:
    job = prepare(run_request(site=Site(gpus=style), options={"gpus-per-node": "4"}))
    assert {key: job.options[key] for key in job.options if "gpu" in key or key == "gres"} == {name: value}
    assert "LHCP_GPUS=4  # processes on each node\n" in job.text


@pytest.mark.parametrize("by_user", [False, True])
def test_another_gres_does_not_replace_the_gpus(folder: Path, by_user: bool) -> None:
    """Of two --gres sbatch takes the last: both must go into one, unless that is refused."""
    gres = {"gres": "nvme:1"}
    site = Site(gpus="--gres=gpu:{n}", sbatch={} if by_user else gres)
    found = "gpu:8,nvme:1"
    with suppress(ConfigError):
        found = str(prepare(run_request(site=site, options=gres if by_user else {})).options["gres"])
    assert sorted(found.split(",")) == ["gpu:8", "nvme:1"]


def test_the_python_of_jobs(folder: Path) -> None:
    container = Container(runtime="pyxis", image="torch")
    assert Site().interpreter() == sys.executable
    assert Site(container=container).interpreter() == "python3"
    assert Site(container=container, python="/opt/python").interpreter() == "/opt/python"


def record(job: Prepared, number: str, **changes: object) -> Job:
    return job_record(job.folder, number, name=job.name, **changes)


def test_records_of_jobs(folder: Path) -> None:
    out = folder / "run"
    assert jobs.submitted(out) == []
    with pytest.raises(ConfigError) as error:
        jobs.newest_folder(out)
    assert str(error.value) == f"{out}: nothing was submitted from there; submit a configuration: lhcp submit CONFIG"
    job = prepare(run_request())
    job.write()
    jobs.remember(out, [record(job, "7")])
    jobs.remember(out, [record(job, "8")])
    assert jobs.submitted(out) == [record(job, "7"), record(job, "8")]
    assert jobs.newest_folder(out) == job.folder
    with pytest.raises(ConfigError, match=rf"nothing was submitted from there; name {out}, whose job it is$"):
        jobs.newest_folder(out / "arm")
    lines = (out / "jobs" / "jobs.jsonl").read_text().splitlines()
    assert [json.loads(line)["job_id"] for line in lines] == ["7", "8"]


@pytest.mark.parametrize(
    ("state", "code", "expected", "words"),
    [
        ("COMPLETED Reason=None", "0:0", 0, "completed"),
        ("FAILED Reason=NonZeroExitCode", "2:0", 2, "failed with exit code 2"),
        ("FAILED Reason=NonZeroExitCode", "75:0", 75, "stopped, and saved"),
        ("FAILED Reason=None", "0:9", 137, "failed with exit code 137"),
        ("TIMEOUT Reason=TimeLimit", "0:15", 143, "timeout (TimeLimit)"),
        ("NODE_FAIL Reason=NodeDown", "0:0", 1, "node fail (NodeDown)"),
        ("CANCELLED Reason=DependencyNeverSatisfied", "0:0", 75, "cancelled (DependencyNeverSatisfied)"),
    ],
)
def test_how_jobs_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch, state: str, code: str, expected: int, words: str
) -> None:
    """From lines that Slurm 22.05 prints, shortened."""
    line = f"JobId=9 ArrayJobId=7 ArrayTaskId={{}} JobName=x JobState={state} Dependency=(null) ExitCode={code} Y=1\n"
    monkeypatch.setattr(jobs, "_slurm", lambda *_: line.format(1) + line.format(0))
    ends = jobs.ends(job_record(folder / "jobs" / "001"))
    assert [(end.element, end.code, end.in_words) for end in ends] == [(0, expected, words), (1, expected, words)]


def test_records_after_a_move_and_a_full_disk(folder: Path) -> None:
    job = prepare(run_request())
    job.write()
    jobs.remember(job.out, [record(job, "7")])
    with (job.out / "jobs" / "jobs.jsonl").open("a") as file:
        file.write('{"job_id": "8", "na')
    moved = job.out.rename(folder / "moved")
    (only,) = jobs.submitted(moved)
    assert (only.job_id, only.folder, only.log) == ("7", moved / "jobs/001", moved / "jobs/001/slurm-7.out")
    jobs.remember(moved, [record(job, "9")])
    assert [job.job_id for job in jobs.submitted(moved)] == ["7", "9"]


def test_what_could_not_be_written_is_taken_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepare(run_request())
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", full_disk)
        with pytest.raises(OSError, match="No space left"):
            job.write()
    assert not job.out.exists()
    prepare(run_request()).write()


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_that_was_moved_is_not_submitted_again(folder: Path) -> None:
    job = prepare(run_request())
    job.write()
    jobs.remember(job.out, [record(job, "7")])
    moved = folder / "moved"
    job.out.rename(moved)
    with pytest.raises(ConfigError) as error:
        submit.again(moved)
    config = moved / "jobs" / "001" / "config.yaml"
    assert str(error.value) == (
        f"{moved} was moved since it was submitted; submit it anew: lhcp submit {config} --resume --set "
        f"output_dir={moved}"
    )


def lhcp_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "from lhcp.cli import main; main()"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)


def test_options_for_a_folder_are_refused(folder: Path) -> None:
    """Its last job is submitted as it is: what is asked for beyond that would be left out in silence."""
    job = prepare(run_request())
    job.write()
    jobs.remember(job.out, [record(job, "7")])
    assert lhcp_command("submit", "run", "--dry-run").stdout == job.text
    for option in (["--nodes", "4"], ["--set", "seed=1"], ["--sbatch", "nice"], ["--time", "5"]):
        done = lhcp_command("submit", "run", "--dry-run", *option)
        assert (done.returncode, done.stdout) == (2, ""), option


def test_data_that_a_measurement_does_not_read_is_not_mounted(folder: Path) -> None:
    """A container does not start where a mount does not exist."""
    site = Site(container=Container(runtime="pyxis", image="torch"))
    config = Path("configurations/run.yaml")
    overrides = ["data.path=nowhere"]
    job = prepare(Request(template="latency", config=config, overrides=overrides, out=Path("out"), site=site))
    assert "nowhere" not in job.text


def test_logs_after_a_submission_that_was_killed(folder: Path) -> None:
    """The last job has a log, though the last folder has no job."""
    job = prepare(run_request())
    job.write()
    jobs.remember(job.out, [record(job, "7")])
    record(job, "7").log.write_text("step 1\n")
    prepare(run_request(resume=True)).write()
    done = lhcp_command("logs", "run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "step 1\n", "")
