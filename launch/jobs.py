"""The jobs of an output folder: what was submitted, how Slurm sees it, its log, its end. Imports no torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lhcp.config import ConfigError, Section
from lhcp.stop import EXIT_STOPPED

JOBS_FOLDER = "jobs"
"""In an output folder; a folder in it for each submission, see lhcp.launch.prepare."""
_RECORDS = "jobs.jsonl"
_CANCELLED = "cancelled"
_FOLLOW_S = 1.0
"""Seconds between two looks at a log that is followed."""
_PATIENCE, _PATIENCE_S = 30, 10.0
"""How often, and after how many seconds, Slurm is asked again while a log is followed."""
NO_SLURM = (
    "Slurm's commands are not on PATH; submit on a machine that has them (a login node), or start the run without "
    "Slurm: lhcp launch torchrun"
)


class Job(Section):
    """One submitted job, or one job array."""

    job_id: str
    name: str
    folder: Path
    """Of the submission."""
    log: Path
    """In an array, that of element 0."""
    submitted: str
    """ISO 8601, UTC."""
    elements: int | None = None
    """Of an array; None: it is none."""

    def log_of(self, element: int) -> Path:
        """The log of one element of an array."""
        return self.log.with_name(re.sub(r"_0(_0_log)?\.out$", rf"_{element}\1.out", self.log.name))


class JobState(Section):
    """What Slurm says of a job, or of one element of an array."""

    job_id: str
    state: str
    """Such as PENDING or RUNNING."""
    why: str
    """Why it waits, or where it runs; empty where Slurm does not say."""


def remember(out: Path, jobs: Sequence[Job]) -> None:
    """Append to the records of an output folder."""
    with (out / JOBS_FOLDER / _RECORDS).open("a", encoding="utf-8") as file:
        file.writelines(job.model_dump_json() + "\n" for job in jobs)


def numbers(out: Path) -> list[int]:
    """Of the submissions of an output folder, ascending."""
    folder = out / JOBS_FOLDER
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def newest_folder(out: Path) -> Path:
    """Of the last submission.

    Raises:
        ConfigError: there is none.
    """
    if not submitted(out):
        raise ConfigError(f"{out}: nothing was submitted from there; submit a configuration: lhcp submit CONFIG")
    return out / JOBS_FOLDER / f"{numbers(out)[-1]:03d}"


def submitted(out: Path) -> list[Job]:
    """The jobs of an output folder, oldest first."""
    path = out / JOBS_FOLDER / _RECORDS
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    return [Job.model_validate_json(line) for line in lines if line]


def states(jobs: Sequence[Job]) -> list[JobState]:
    """Of those that have not ended.

    Raises:
        ConfigError: Slurm does not answer, or is not there.
    """
    if not jobs:
        return []
    wanted = {job.job_id for job in jobs}
    found = []
    for line in _slurm("squeue", "--noheader", "--array", "--format=%i|%F|%T|%R", "--me").splitlines():
        job_id, array_id, state, why = line.split("|", 3)
        if {job_id, array_id} & wanted:
            found.append(JobState(job_id=job_id, state=state, why="" if why == "(None)" else why.strip("()")))
    return found


def exit_code(job: Job) -> int:
    """Of a job that has just ended, as a shell has it; in an array the largest.

    Raises:
        ConfigError: Slurm knows it no more.
    """
    try:
        shown = _slurm("scontrol", "--oneliner", "show", "job", job.job_id)
    except ConfigError as error:
        raise ConfigError(f"job {job.job_id} has ended, and Slurm does not know how ({error})") from None
    pairs = [(int(code), int(number)) for code, number in re.findall(r"\bExitCode=(\d+):(\d+)", shown)]
    cancelled = EXIT_STOPPED if "JobState=CANCELLED" in shown else 0
    return max([code or (128 + number if number else 0) for code, number in pairs] + [cancelled])


def check_known(job_id: str) -> None:
    """Refuse the number of a job that Slurm does not know: a job behind it would start at once.

    Raises:
        ConfigError: saying so.
    """
    if not re.fullmatch(r"\d+(_\d+)?", job_id):
        raise ConfigError(f"--after: given {job_id!r}, must be the number of a job")
    try:
        _slurm("scontrol", "show", "job", job_id)
    except ConfigError as error:
        raise ConfigError(
            f"--after {job_id}: Slurm does not know that job; if it ended long ago, leave --after out ({error})"
        ) from None


def cancel(out: Path, now: bool = False) -> list[JobState]:
    """End all jobs of an output folder: what trains saves first, and is not requeued.

    Args:
        out: the folder.
        now: end them at once, without a save.

    Returns:
        The jobs that were told.

    Raises:
        ConfigError: none is left, or Slurm refuses.
    """
    jobs = submitted(out)
    left = states(jobs)
    if not left:
        raise ConfigError(f"{out}: no job is waiting or running; `squeue --me` lists all of yours")
    with (out / JOBS_FOLDER / _CANCELLED).open("a", encoding="utf-8") as file:
        file.writelines(f"{job.job_id}\n" for job in jobs)
    running = [] if now else [job.job_id for job in left if job.state == "RUNNING"]
    others = [job.job_id for job in left if job.job_id not in running]
    if others:
        _slurm("scancel", *others)
    if running:
        _slurm("scancel", "--signal=USR1", *running)
    return left


def end(job_id: str) -> None:
    """End one job at once."""
    _slurm("scancel", job_id)


def is_cancelled(out: Path) -> bool:
    """Whether the job that this process is part of was told to end for good."""
    path = out / JOBS_FOLDER / _CANCELLED
    cancelled = path.read_text(encoding="utf-8").split() if path.exists() else []
    mine = {os.environ.get(name) for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID")}
    return not mine.isdisjoint(cancelled)


def log_so_far(job: Job, log: Path) -> Iterator[str]:
    """What a job has written to its log, or to that of an element.

    Raises:
        ConfigError: nothing yet.
    """
    if not log.exists():
        left = states([job])
        waits = f"it is {left[0].state} ({left[0].why})" if left else "Slurm does not know it (any more)"
        raise ConfigError(f"job {job.job_id} has no log {log} yet: {waits}")
    with log.open(encoding="utf-8", errors="replace") as file:
        while text := file.read(65_536):
            yield text


def follow(job: Job, log: Path) -> Iterator[str]:
    """The log of a job, or of an element, as it grows, until the job has ended; says what it waits for meanwhile.

    Raises:
        ConfigError: it has ended without a log.
    """
    told = None
    while not log.exists() and (left := _patient_states(job)):
        state = f"job {left[0].job_id}: {left[0].state} ({left[0].why})"
        if state != told:
            print(state, file=sys.stderr)
        told = state
        time.sleep(_FOLLOW_S)
    if not log.exists():
        raise ConfigError(f"job {job.job_id} has ended and left no log at {log}")
    with log.open(encoding="utf-8", errors="replace") as file:
        ended = False
        while not ended:
            ended = not _patient_states(job)  # asked before the last look, so that nothing is missed
            while text := file.read(65_536):
                yield text
            if not ended:
                time.sleep(_FOLLOW_S)


def _patient_states(job: Job) -> list[JobState]:
    """`states`, asked again for a while where Slurm does not answer: its controller may be starting."""
    for _ in range(_PATIENCE):
        try:
            return states([job])
        except ConfigError as error:
            print(f"note: {error}", file=sys.stderr)
            time.sleep(_PATIENCE_S)
    return states([job])


def submit_script(script: Path, flags: Sequence[str] = ()) -> str:
    """Submit with sbatch; the job's number.

    Raises:
        ConfigError: Slurm refuses, or is not there.
    """
    answer = _slurm("sbatch", "--parsable", *flags, str(script))
    match = re.match(r"(\d+)", answer)
    if match is None:
        raise ConfigError(f"sbatch answered {answer!r}, which names no job")
    return match[1]


@contextmanager
def own_environment() -> Iterator[None]:
    """Without the variables that change what Slurm's commands do, or are those of a job that this runs in."""
    kept = dict(os.environ)
    for name in kept:
        if name.startswith(("SBATCH_", "SQUEUE_", "SCANCEL_", "SLURM_")) and name != "SLURM_CONF":
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)


def _slurm(*command: str) -> str:
    """Run one of Slurm's commands; what it prints.

    Raises:
        ConfigError: it is not there, or it failed; with what it said.
    """
    try:
        with own_environment():
            done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(NO_SLURM) from None
    if done.returncode:
        said = "\n".join(line for line in done.stderr.splitlines() if line.strip())
        raise ConfigError(said or f"{command[0]} failed with exit code {done.returncode}")
    return done.stdout
