"""The jobs of an output folder: what was submitted, how Slurm sees it, its log, its end. Imports no torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import ValidationError

from lhcp.config import ConfigError, Section
from lhcp.stop import EXIT_STOPPED

JOBS_FOLDER = "jobs"
"""In an output folder; a folder in it for each submission, see lhcp.launch.prepare."""
_RECORDS = "jobs.jsonl"
_CANCELLED = "cancelled"
_CODES = {"COMPLETED": 0, "CANCELLED": EXIT_STOPPED}
"""Of states in which the script itself did not fail; others, such as NODE_FAIL, are failures all the same."""
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT")
"""Variables that say how Slurm is reached."""
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
    template: str
    """Name, or file."""
    options: dict[str, str | None]
    """Options of sbatch that were asked for, instead of the template's and the site's."""
    trains: bool
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

    @property
    def in_words(self) -> str:
        """Such as `pending (Priority)`."""
        return self.state.lower() + (f" ({self.why})" if self.why else "")


class JobEnd(Section):
    """How a job, or an element of an array, has ended."""

    element: int | None
    """None: of no array."""
    state: str
    """Such as COMPLETED or FAILED."""
    why: str
    """Slurm's reason; empty where there is none."""
    code: int
    """As a shell has it."""

    @property
    def in_words(self) -> str:
        """Such as `failed with exit code 2`."""
        if self.state == "FAILED":
            return "stopped, and saved" if self.code == EXIT_STOPPED else f"failed with exit code {self.code}"
        return self.state.lower().replace("_", " ") + (f" ({self.why})" if self.why else "")


def remember(out: Path, jobs: Sequence[Job]) -> None:
    """Append to the records of an output folder."""
    path = out / JOBS_FOLDER / _RECORDS
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.writelines(["\n" * torn, *(job.model_dump_json() + "\n" for job in jobs)])


def numbers(out: Path) -> list[int]:
    """Of the submissions of an output folder, ascending."""
    folder = out / JOBS_FOLDER
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def newest_folder(out: Path) -> Path:
    """Of the last job.

    Raises:
        ConfigError: there is none.
    """
    if not (done := submitted(out)):
        of_array = bool(submitted(out.parent))
        remedy = f"name {out.parent}, whose job it is" if of_array else "submit a configuration: lhcp submit CONFIG"
        raise ConfigError(f"{out}: nothing was submitted from there; {remedy}")
    return done[-1].folder


def submitted(out: Path) -> list[Job]:
    """The jobs of an output folder, oldest first; their paths are in `out`, which may have been moved."""
    path = out / JOBS_FOLDER / _RECORDS
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    found = []
    for line in lines:
        with suppress(ValidationError):  # the last, torn by a full disk
            found.append(Job.model_validate_json(line))
    folders = [out / JOBS_FOLDER / job.folder.name for job in found]
    return [
        job.model_copy(update={"folder": folder, "log": folder / job.log.name})
        for job, folder in zip(found, folders, strict=True)
    ]


def states(jobs: Sequence[Job]) -> list[JobState]:
    """Of those that have not ended.

    Raises:
        ConfigError: Slurm does not answer, or is not there.
    """
    if not jobs:
        return []
    wanted = {job.job_id for job in jobs}
    found = []
    for line in _slurm("squeue", "--noheader", "--array", "--format=%i|%F|%T|%R", "--me", "--all").splitlines():
        job_id, array_id, state, why = line.split("|", 3)
        if {job_id, array_id} & wanted:
            found.append(JobState(job_id=job_id, state=state, why="" if why == "(None)" else why.strip("()")))
    return found


def slurm_answers() -> bool:
    """Whether Slurm can be asked from here."""
    try:
        _slurm("scontrol", "ping")
    except ConfigError:
        return False
    return True


def ends(job: Job) -> list[JobEnd]:
    """How a job that is not among `states` has ended; in an array each element, in order.

    Raises:
        ConfigError: Slurm knows it no more: it forgets after some minutes.
    """
    try:
        shown = _slurm("scontrol", "--oneliner", "show", "job", job.job_id)
    except ConfigError as error:
        raise ConfigError(f"job {job.job_id} has ended, and Slurm does not know how ({error})") from None
    found = []
    for line in shown.splitlines():
        fields = dict(re.findall(r"(?:^|\s)(JobState|Reason|ExitCode|ArrayTaskId)=(\S+)", line))
        code, number = map(int, fields["ExitCode"].split(":"))
        element, why = fields.get("ArrayTaskId", ""), fields["Reason"]
        found.append(
            JobEnd(
                element=int(element) if element.isdecimal() else None,
                state=fields["JobState"],
                why="" if why == "None" else why,
                code=code or (128 + number if number else _CODES.get(fields["JobState"], 1)),
            )
        )
    return sorted(found, key=lambda end: end.element or 0)


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
        is_ = f"is {left[0].in_words} and has no log {log} yet" if left else f"left no log {log}{_how_ended(job)}"
        raise ConfigError(f"job {job.job_id} {is_}")
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
        state = f"job {left[0].job_id} is {left[0].in_words}"
        if state != told:
            print(state, file=sys.stderr)
        told = state
        time.sleep(_FOLLOW_S)
    if not log.exists():
        raise ConfigError(f"job {job.job_id} left no log {log}{_how_ended(job)}")
    with log.open(encoding="utf-8", errors="replace") as file:
        ended = False
        while not ended:
            ended = not _patient_states(job)  # asked before the last look, so that nothing is missed
            while text := file.read(65_536):
                yield text
            if not ended:
                time.sleep(_FOLLOW_S)


def _how_ended(job: Job) -> str:
    try:
        return f": it is {ends(job)[0].in_words}"
    except ConfigError:
        return ", and Slurm does not know it any more"


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
        if name.startswith(("SBATCH_", "SQUEUE_", "SCANCEL_", "SLURM_")) and name not in _KEPT:
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
