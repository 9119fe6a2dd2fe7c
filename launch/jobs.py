"""The jobs of an output folder: what was submitted, how Slurm sees it, its log, its end. Imports no torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from lhcp.config import ConfigError, Section

JOBS_FOLDER = "jobs"
"""In an output folder; a folder in it for each submission, see lhcp.launch.prepare."""
_RECORDS = "jobs.jsonl"
_CANCELLED = "cancelled"
_FOLLOW_S = 1.0
"""Seconds between two looks at a log that is followed."""


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


class JobState(Section):
    """What Slurm says of a job, or of one element of an array."""

    job_id: str
    state: str
    """Such as PENDING or RUNNING."""
    why: str
    """Why it waits, or where it runs."""


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
    """Of those that have not ended; none where Slurm does not answer."""
    if not jobs:
        return []
    wanted = {job.job_id for job in jobs}
    try:
        listed = _slurm("squeue", "--noheader", "--format=%i|%F|%T|%R", "--me").splitlines()
    except OSError:
        return []
    found = []
    for line in listed:
        job_id, array_id, state, why = line.split("|", 3)
        if {job_id, array_id} & wanted:
            found.append(JobState(job_id=job_id, state=state, why=why.strip("()")))
    return found


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
    try:
        if others:
            _slurm("scancel", *others)
        if running:
            _slurm("scancel", "--signal=USR1", *running)
    except OSError as error:
        raise ConfigError(str(error)) from None
    return left


def is_cancelled(out: Path) -> bool:
    """Whether the job that this process is part of was told to end for good."""
    path = out / JOBS_FOLDER / _CANCELLED
    cancelled = path.read_text(encoding="utf-8").split() if path.exists() else []
    mine = {os.environ.get(name) for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID")}
    return not mine.isdisjoint(cancelled)


def log_so_far(job: Job) -> Iterator[str]:
    """What a job has written.

    Raises:
        ConfigError: nothing yet.
    """
    if not job.log.exists():
        left = states([job])
        waits = f"it is {left[0].state} ({left[0].why})" if left else "Slurm does not know it (any more)"
        raise ConfigError(f"job {job.job_id} has no log yet: {waits}")
    with job.log.open(encoding="utf-8", errors="replace") as file:
        while text := file.read(65_536):
            yield text


def follow(job: Job) -> Iterator[str]:
    """The log of a job as it grows, until the job has ended; says what it waits for meanwhile.

    Raises:
        ConfigError: it has ended without a log.
    """
    told = None
    while not job.log.exists() and (left := states([job])):
        state = f"job {left[0].job_id}: {left[0].state} ({left[0].why})"
        if state != told:
            print(state, file=sys.stderr)
        told = state
        time.sleep(_FOLLOW_S)
    if not job.log.exists():
        raise ConfigError(f"job {job.job_id} has ended and left no log at {job.log}")
    with job.log.open(encoding="utf-8", errors="replace") as file:
        ended = False
        while not ended:
            ended = not states([job])  # asked before the last look, so that nothing is missed
            while text := file.read(65_536):
                yield text
            if not ended:
                time.sleep(_FOLLOW_S)


def submit_script(script: Path, flags: Sequence[str] = ()) -> str:
    """Submit with sbatch; the job's number.

    Raises:
        ConfigError: Slurm refuses, or is not there.
    """
    try:
        answer = _slurm("sbatch", "--parsable", *flags, str(script))
    except OSError as error:
        raise ConfigError(str(error)) from None
    match = re.match(r"(\d+)", answer)
    if match is None:
        raise ConfigError(f"sbatch answered {answer!r}, which names no job")
    return match[1]


def _slurm(*command: str) -> str:
    """Run one of Slurm's commands; what it prints.

    Raises:
        OSError: it is not there, or it failed; with what it said.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SBATCH_", "SQUEUE_"))}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise OSError(f"{command[0]}: not found; submit on a machine that has Slurm's commands") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        with suppress(IndexError):
            raise OSError(said[-1] if len(said) == 1 else "\n".join(said))
        raise OSError(f"{command[0]} failed with exit code {done.returncode}")
    return done.stdout
