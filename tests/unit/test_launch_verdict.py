"""What a job does next, by what has happened in its run folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from job_records import job_record
from lhcp import config_file
from lhcp.checkpoint.folder import step_folder
from lhcp.config import RunConfig
from lhcp.launch import jobs, submit, verdict
from lhcp.launch.verdict import FAILURES_FILE, forgive, in_a_row, next_action
from lhcp.lock import holder
from lhcp.progress import read_steps
from runs import make_config


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "LHCP_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """A run of 20 steps with a folder of its own."""
    return make_run(tmp_path / "run")


def make_run(run_dir: Path, max_failures: int = 3) -> RunConfig:
    run_dir.mkdir(parents=True)
    data = run_dir.parent / "tokens"
    return make_config(data, 1, 2, output_dir=run_dir, checkpoint={"max_failures": max_failures})


def publish(run: RunConfig, step: int) -> None:
    step_folder(run.output_dir, step).mkdir(parents=True)


def log_steps(run: RunConfig, count: int) -> None:
    """The metrics of the first `count` steps."""
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(count)]
    (run.output_dir / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def ask(run: RunConfig, outcome: str | int) -> str:
    return next_action(run, run.output_dir, str(outcome), {})


def failures(run: RunConfig) -> list[dict[str, object]]:
    path = run.output_dir / FAILURES_FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("outcome", "answers"),
    [
        (0, ["end 0", "end 0", "end 0", "end 0"]),
        (2, ["end 2", "end 2", "end 2", "end 2"]),
        (75, ["requeue", "requeue", "end 1", "end 1"]),
        (1, ["run", "requeue", "end 1", "end 1"]),
        (76, ["requeue", "requeue", "end 1", "end 1"]),
        (138, ["requeue", "requeue", "end 1", "end 1"]),
        (143, ["requeue", "requeue", "end 1", "end 1"]),
        (137, ["run", "requeue", "end 1", "end 1"]),
    ],
)
def test_the_same_again_and_again(run: RunConfig, outcome: int, answers: list[str]) -> None:
    assert [ask(run, outcome) for _ in range(4)] == answers
    assert [failure["code"] for failure in failures(run)] == (
        [75 if outcome in (138, 143) else outcome] * 4 if "end 1" in answers else []
    )


@pytest.mark.parametrize(
    ("history", "answers"),
    [
        # A number is an exit code, and "+" a checkpoint that was published.
        ([1, 1, 75, 1], ["run", "requeue", "end 1", "end 1"]),
        ([1, 1, "+", 75, 1, 1, 1], ["run", "requeue", "requeue", "run", "requeue", "end 1"]),
        (["+", 75, "+", 75, "+", 75, "+", 75], ["requeue", "requeue", "requeue", "requeue"]),
        ([138, 138], ["requeue", "requeue"]),
        ([1, 1, "+", 1, 1, 1], ["run", "requeue", "run", "requeue", "end 1"]),
        ([1, "+", 1, "+", 1, "+", 1], ["run", "run", "run", "run"]),
        (["+", 1, 1, 1], ["run", "requeue", "end 1"]),
        ([1, 1, "submitted", 1, 1, 1], ["run", "requeue", "run", "requeue", "end 1"]),
        ([1, 1, 1, "start"], ["run", "requeue", "end 1", "end 1"]),
        ([1, 1, 1, "+", "start"], ["run", "requeue", "end 1", "run"]),
        ([1, 1, 1, "submitted", "start"], ["run", "requeue", "end 1", "run"]),
        (["start", 1, "start", 1, "start"], ["run", "run", "run", "requeue", "run"]),
        ([1, 76, 1], ["run", "requeue", "end 1"]),
        ([1, 1, 0], ["run", "requeue", "end 0"]),
        ([1, 1, 2], ["run", "requeue", "end 2"]),
    ],
)
def test_histories(run: RunConfig, history: list[int | str], answers: list[str]) -> None:
    given, published = [], 0
    for event in history:
        if event == "+":
            published += 1
            publish(run, published)
        elif event == "submitted":
            forgive(run.output_dir)
        else:
            given.append(ask(run, event))
    assert given == answers


def test_what_is_recorded(run: RunConfig) -> None:
    publish(run, 5)
    log_steps(run, 7)
    next_action(run, run.output_dir, "137", {"slurm_job_id": "12", "slurm_job_nodelist": "n[1-2]"})
    (failure,) = failures(run)
    assert str(failure.pop("time")).endswith("+00:00")
    job = {"slurm_job_id": "12", "slurm_job_nodelist": "n[1-2]"}
    assert failure == {"code": 137, "step": 7, "saved": 5} | job


def test_the_message_of_a_crash_loop(run: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    publish(run, 5)
    log_steps(run, 7)
    assert [ask(run, code) for code in (1, 137)] == ["run", "requeue"]
    assert capsys.readouterr() == ("", "")
    assert ask(run, 1) == "end 1"
    folder = run.output_dir
    message = (
        "error: step 8 of 20 failed 3 times in a row, with no new checkpoint between (exit codes 1, 137, 1): not "
        "started again\n"
        f"       what was wrong is said above; when it is mended, go on by lhcp submit {folder},\n"
        f"       or, with another configuration or site file, by lhcp submit CONFIG --resume\n"
    )
    assert capsys.readouterr() == ("", message)
    assert ask(run, "start") == "end 1"
    assert capsys.readouterr() == ("", message)


def test_the_message_of_a_start_that_is_too_slow(run: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert [ask(run, code) for code in (75, 138, 75)] == ["requeue", "requeue", "end 1"]
    said = capsys.readouterr().err
    assert said.startswith(
        "error: told to stop 3 times in a row before there was a new checkpoint: not started again\n"
    )


def test_a_lock_that_is_let_go(
    run: RunConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "_LOOK_S", 0.05)
    holding = "import sys, time; from pathlib import Path; from lhcp.lock import locked\n" \
              "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(float(sys.argv[2]))"  # fmt: skip
    for seconds, limit in (("1", 30.0), ("30", 0.3)):
        monkeypatch.setattr(verdict, "_LOCK_S", limit)
        with subprocess.Popen(
            [sys.executable, "-c", holding, str(run.output_dir), seconds], stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            other.stdout.readline()
            began = time.monotonic()
            assert ask(run, "start") == ("run" if seconds == "1" else "requeue")
            assert 0.2 < time.monotonic() - began < 10
            assert (holder(run.output_dir) is None) == (seconds == "1")
            other.kill()
        assert f"{run.output_dir} is in use by process {other.pid} on " in capsys.readouterr().err
    assert [failure["code"] for failure in failures(run)] == [2]
    assert ask(run, "start") == "run"
    assert capsys.readouterr().err == ""


def test_the_message_names_every_step_that_failed(run: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    for done in (7, 0, 7):
        log_steps(run, done)
        ask(run, 1)
    assert capsys.readouterr().err.startswith("error: steps 1, 8 of 20 failed 3 times in a row, ")


@pytest.mark.parametrize("code", [1, 76, 137])
def test_one_failure_can_be_the_end(tmp_path: Path, code: int) -> None:
    assert ask(make_run(tmp_path / "run", max_failures=1), code) == "end 1"


def test_two_failures_can_be_the_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", max_failures=2)
    assert [ask(run, 1), ask(run, 1)] == ["run", "end 1"]


def test_a_finished_run(run: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    publish(run, 19)
    assert ask(run, "start") == "run"
    publish(run, 20)
    assert ask(run, "start") == "end 0"
    assert capsys.readouterr().err == f"the run in {run.output_dir} is finished: 20 steps\n"


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"])
@pytest.mark.parametrize(
    ("outcome", "answer"), [("start", "end 75"), ("75", "end 75"), ("1", "end 1"), ("76", "end 76"), ("0", "end 0")]
)
def test_a_cancelled_job(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, variable: str, outcome: str, answer: str
) -> None:
    (run.output_dir / "jobs").mkdir()
    (run.output_dir / "jobs" / "cancelled").write_text("12\n34\n")
    monkeypatch.setenv(variable, "3")
    assert ask(run, outcome) == {"start": "run", "75": "requeue", "1": "run", "76": "requeue", "0": "end 0"}[outcome]
    (run.output_dir / FAILURES_FILE).unlink(missing_ok=True)
    monkeypatch.setenv(variable, "34")
    assert ask(run, outcome) == answer
    assert failures(run) == []  # it is none


def test_forgiving_writes_nothing_where_nothing_failed(run: RunConfig) -> None:
    forgive(run.output_dir)
    assert list(run.output_dir.iterdir()) == []


def test_a_record_that_was_torn_by_a_kill(run: RunConfig) -> None:
    """The next record begins a line of its own; the torn one is none."""
    assert ask(run, 1) == "run"
    with (run.output_dir / FAILURES_FILE).open("a") as file:
        file.write('{"time": "2026-11-')
    assert ask(run, 1) == "requeue"
    assert len(in_a_row(run.output_dir)) == 2
    assert ask(run, 1) == "end 1"


def test_a_run_that_has_gone_back(run: RunConfig) -> None:
    """Steps after those of the last start are done again."""
    log_steps(run, 9)
    os.utime(run.output_dir / "metrics.jsonl", (1_000_000_000, 1_000_000_000))
    (run.output_dir / "starts.jsonl").write_text('{"time": "2026-01-01T00:00:00+00:00", "step": 5}\n')
    assert len(read_steps(run.output_dir)[0]) == 5
    ask(run, 1)
    assert failures(run)[0]["step"] == 5


def test_the_message_of_an_arm_names_what_can_be_submitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`lhcp submit` knows OUT, which has the jobs of all arms, and not the folder of one."""
    out = tmp_path / "out"
    assert next_action(make_run(out / "arm", max_failures=1), out, "1", {}) == "end 1"
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].endswith(f"go on by lhcp submit {out},")


def test_submitting_a_grid_again_forgives_its_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run = make_run(out / "arm", max_failures=1)
    assert next_action(run, out, "1", {}) == "end 1"
    folder = out / "jobs" / "001"
    folder.mkdir(parents=True)
    (folder / "job.sbatch").write_text(f"export LHCP_JOB={folder}\n")
    (folder / "elements.txt").write_text("arm\n")
    config_file.save(run, folder / "config-0.yaml")
    jobs.remember(out, [job_record(folder, elements=1)])
    for name, script in {"sbatch": "echo 2", "squeue": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [job.job_id for job in submit.again(out)] == ["2"]
    assert next_action(run, out, "start", {}) == "run"


def test_the_command(run: RunConfig) -> None:
    """As slurm/lib/train.sh asks; it starts in a fraction of a second, without torch."""
    config = run.output_dir / "config.yaml"
    config_file.save(run, config)
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "LHCP_OUT": str(run.output_dir)}
    program = "import runpy, sys; sys.modules['torch'] = None; runpy.run_module('lhcp.launch.verdict', alter_sys=True, "
    answers = []
    for outcome in ("start", "1", "1"):
        command = [sys.executable, "-c", f"{program}run_name='__main__')", config, outcome]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        answers.append((done.returncode, done.stdout, done.stderr))
    command = [sys.executable, "-m", "lhcp.launch.verdict", config, "137"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert answers == [(0, "run\n", ""), (0, "run\n", ""), (0, "requeue\n", "")]
    assert (done.returncode, done.stdout) == (0, "end 1\n")
    assert done.stderr.startswith("error: step 1 of 20 failed 3 times in a row, ")
    jobs_of = [(failure["slurm_job_id"], failure["slurm_job_nodelist"]) for failure in failures(run)]
    assert jobs_of == [("7", "n1")] * 3
