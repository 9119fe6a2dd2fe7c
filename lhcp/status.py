"""`lhcp status`: how far a run is, from its folder alone. Imports no torch and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import Literal

from rich.console import Console
from rich.text import Text

from lhcp import config_file
from lhcp.checkpoint.folder import published, step_folder
from lhcp.checkpoint.manifest import Checkpoint
from lhcp.config import ConfigError, RunConfig, Section, StageMode
from lhcp.config_file import CONFIG_FILE
from lhcp.flops import step_flops
from lhcp.launch.jobs import JobEnd, JobState, ends, newest_folder, states, submitted
from lhcp.launch.verdict import in_a_row
from lhcp.lock import holder
from lhcp.metrics import HELD_OUT, read_events
from lhcp.progress import Record, read_starts, read_steps
from lhcp.stop import EXIT_STOPPED

State = Literal["waiting to start", "starting", "running", "stopped", "failed", "finished"]
_STYLES: dict[State, str] = {
    "waiting to start": "yellow", "starting": "cyan", "running": "cyan", "stopped": "yellow", "failed": "red",
    "finished": "green",
}  # fmt: skip
_RECENT = 20
"""Steps, or finite losses, that the mean loss and the speed are taken over."""
_TIMED = 50
"""Last steps of a stage that the time of a step is taken from."""
_INDENT = 17


class CheckpointStatus(Section):
    """A published checkpoint whose manifest is whole; its other files are not read."""

    step: int
    """Steps done."""
    created: str
    """ISO 8601."""
    age_s: float


class HeldOutStatus(Section):
    """The last held-out loss of one kind."""

    step: int
    """Steps done."""
    loss: float | None
    """Nats per token, None when it was not finite."""


class RunStatus(Section):
    """What a run folder says at one time. None: there is no such value yet."""

    run_dir: Path
    state: State
    step: int
    """Steps done."""
    total_steps: int
    stage: StageMode
    """Mode of the last step's stage, of the first stage before any step."""
    stage_number: int
    """From 1."""
    num_stages: int
    loss: float | None
    """The last finite one, nats per token."""
    mean_loss: float | None
    """Over the last 20 finite ones."""
    tokens_per_s_per_gpu: float | None
    """Median of the last 20 steps."""
    tokens: int
    """Trained on so far."""
    seconds_left: float | None
    """Training time of the steps left, without evaluations."""
    last_step_age_s: float | None
    """Seconds since a step was logged."""
    checkpoint: CheckpointStatus | None
    """The newest that is not damaged."""
    damaged_checkpoints: list[str]
    """What is wrong with newer ones, newest first."""
    num_checkpoints: int
    """Published ones, damaged or not."""
    restarts: int
    skipped_steps: int
    """Steps that were not finite and left the weights alone."""
    held_out: dict[str, HeldOutStatus]
    """By name of the event, in the order of the run's first evaluation."""
    jobs: list[JobState] | None
    """Slurm jobs of this run that wait or run; None where Slurm does not answer."""
    last_end: str | None
    """How the last of these ended, as long as Slurm knows; None, too, while there are `jobs`."""
    submitted: int
    """Slurm jobs of this run so far."""
    failures: int
    """In a row without a new checkpoint, of jobs."""
    last_failure: str | None
    """When and how the last of these ended."""


def read_status(run_dir: Path, now: float) -> RunStatus:
    """The state of the run in `run_dir` at `now`, in seconds since the epoch.

    Raises:
        ConfigError: the folder is no run's, or its configuration cannot be read.
    """
    config = _read_config(run_dir)
    steps, logged = read_steps(run_dir)
    done = steps[-1]["step"] + 1 if steps else 0
    stage = next((n for n, span in enumerate(_spans(config)) if done <= span.stop), len(config.stages) - 1)
    losses = [record["loss"] for record in steps if record["loss"] is not None]
    checkpoint, damaged = _last_checkpoint(run_dir, now)
    saved = checkpoint is not None and checkpoint.step >= config.total_steps
    jobs, failures = job_states(run_dir), in_a_row(run_dir)
    end = _last_end(run_dir) if jobs == [] else None
    failed = bool(failures) or (end is not None and end.code not in (0, EXIT_STOPPED))
    begun = bool(steps) or (jobs == [] and bool(submitted(run_dir)))
    return RunStatus(
        run_dir=run_dir,
        state="finished" if done >= config.total_steps and saved else _state(run_dir, jobs, begun, failed),
        step=done,
        total_steps=config.total_steps,
        stage=config.stages[stage].mode,
        stage_number=stage + 1,
        num_stages=len(config.stages),
        loss=losses[-1] if losses else None,
        mean_loss=fmean(losses[-_RECENT:]) if losses else None,
        tokens_per_s_per_gpu=median(record["tokens_per_s_per_gpu"] for record in steps[-_RECENT:]) if steps else None,
        tokens=steps[-1]["tokens"] if steps else 0,
        seconds_left=_seconds_left(config, steps) if steps else None,
        last_step_age_s=max(0.0, now - logged) if steps else None,
        checkpoint=checkpoint,
        damaged_checkpoints=damaged,
        num_checkpoints=len(published(run_dir)),
        restarts=max(0, len(read_starts(run_dir)) - 1),
        skipped_steps=sum(None in (record["loss"], record["grad_norm"]) for record in steps),
        held_out=_held_out(run_dir, done),
        jobs=jobs,
        last_end=f"{submitted(run_dir)[-1].job_id} {end.in_words}" if end else None,
        submitted=len(submitted(run_dir)),
        failures=len(failures),
        last_failure=_failure(failures[-1]) if failures else None,
    )


def _state(run_dir: Path, jobs: Sequence[JobState] | None, begun: bool, failed: bool) -> State:
    """Of a run that is not finished. One that Slurm knows nothing of does not say why it has stopped."""
    if holder(run_dir):
        return "running"
    if jobs:
        return "waiting to start" if all(job.state == "PENDING" for job in jobs) else "starting"
    return "failed" if failed else "stopped" if begun else "waiting to start"


def _last_end(run_dir: Path) -> JobEnd | None:
    """How the last Slurm job of a run ended, if there was one, and Slurm still knows."""
    with suppress(ConfigError):
        return ends(submitted(run_dir)[-1])[0] if submitted(run_dir) else None
    return None


def job_states(out: Path) -> list[JobState] | None:
    """Of the Slurm jobs of a folder that have not ended; None where Slurm does not answer."""
    try:
        return states(submitted(out))
    except ConfigError:
        return None


def _failure(record: Record) -> str:
    job = f" in job {record['slurm_job_id']}" if "slurm_job_id" in record else ""
    return f"step {record['step'] + 1} ended with exit code {record['code']}{job}, {record['time']}"


def show(status: RunStatus) -> None:
    """Print a status for people; plain text where stdout is not a terminal."""
    console = Console(highlight=False)
    age = "" if status.last_step_age_s is None else f"; last step {_duration(status.last_step_age_s)} ago"
    title = Text.assemble(f"{status.run_dir}: ", (status.state, f"bold {_STYLES[status.state]}"), age)
    console.print(title, soft_wrap=True)
    for label, value, style in _rows(status):
        console.print(Text.assemble((f"  {label:<{_INDENT - 2}}", "dim"), (value, style)), soft_wrap=True)


def _rows(status: RunStatus) -> Iterator[tuple[str, str, str]]:
    """Label, value and style of what there is to tell."""
    share = math.floor(1000 * status.step / status.total_steps) / 10  # 100% only when all steps are done
    yield "step", f"{status.step:,} of {status.total_steps:,} ({share:.1f}%)", "bold"
    yield "stage", f"{status.stage} ({status.stage_number} of {status.num_stages})", ""
    if status.loss is not None:
        yield "loss", f"{status.loss:.4f} (mean of the last {_RECENT}: {status.mean_loss:.4f})", "bold"
    if status.tokens_per_s_per_gpu is not None:
        yield "speed", f"{status.tokens_per_s_per_gpu:,.0f} tokens/s/GPU", ""
    yield "trained on", f"{status.tokens:,} tokens", ""
    if status.seconds_left:
        yield "time left", f"{_duration(status.seconds_left)} of training", ""
    last = status.checkpoint
    newest = f"after step {last.step:,}, {_duration(last.age_s)} ago; " if last else ""
    yield "checkpoint", f"{newest}{status.num_checkpoints} published", ""
    for message in status.damaged_checkpoints:
        yield "", message.splitlines()[0], "bold red"
    yield "restarts", f"{status.restarts:,}", ""
    yield "skipped steps", f"{status.skipped_steps:,}", "yellow" if status.skipped_steps else ""
    for number, (name, held_out) in enumerate(status.held_out.items()):
        kind = name.removeprefix(HELD_OUT).strip("_").replace("_", " ") or "dense"
        loss = "not finite" if held_out.loss is None else f"{held_out.loss:.4f}"
        yield "" if number else "held out", f"{loss} after step {held_out.step:,} ({kind})", ""
    if status.failures:
        yield "failures", f"{status.failures} in a row; the last: {status.last_failure}", "bold red"
    if status.submitted:
        if status.jobs is None:
            yield "jobs", "Slurm does not answer here", "yellow"
        elif not status.jobs:
            last_job = f"; the last, {status.last_end}" if status.last_end else ""
            yield "jobs", f"none waits or runs{last_job}; its log: lhcp logs {status.run_dir}", ""
        for number, job in enumerate(status.jobs or ()):
            yield "" if number else "jobs", f"{job.job_id} {job.in_words}", ""


def holds_other_jobs(out: Path) -> bool:
    """Whether jobs of another kind than a run's write to this folder: an array's, or measurements."""
    jobs = submitted(out)
    return bool(jobs) and (jobs[-1].elements is not None or not jobs[-1].trains)


def show_elements(out: Path, now: float) -> None:
    """Print a line for each job, or for each element of the last array, of a folder that is no run's itself.

    Raises:
        ConfigError: nothing was submitted from there.
    """
    folder, last = newest_folder(out), submitted(out)[-1]
    left = {job.job_id: job.in_words for job in states(submitted(out))}
    ended: dict[int | None, str] = {}
    with suppress(ConfigError):  # Slurm has forgotten
        ended = {end.element: end.in_words for end in ends(last)}
    console = Console(highlight=False)
    if last.elements is None:
        state = left.get(last.job_id) or ended.get(None, "ended")
        console.print(f"{out}: job {last.job_id}: {state}", soft_wrap=True)
        return
    names = (folder / "elements.txt").read_text(encoding="utf-8").splitlines()
    console.print(f"{out}: job {last.job_id}, an array of {last.elements}", soft_wrap=True)
    for number, name in enumerate(names):
        state = left.get(f"{last.job_id}_{number}") or (
            f"{ended.get(number, 'ended')}; its log: lhcp logs {out} --element {number}"
        )
        with suppress(ConfigError):  # not a run, or not begun
            run = read_status(out / name, now)
            state = f"{run.state}, step {run.step:,} of {run.total_steps:,}; {state}"
        console.print(f"  {number:>3}  {name:<{max(map(len, names))}}  {state}", soft_wrap=True)


def _read_config(run_dir: Path) -> RunConfig:
    path = run_dir / CONFIG_FILE
    if not path.is_file() and submitted(run_dir):
        path = newest_folder(run_dir) / CONFIG_FILE  # no job has begun yet
    if not path.is_file():
        reason = f"it has no {CONFIG_FILE}" if run_dir.is_dir() else "there is no such folder"
        raise ConfigError(f"{run_dir} is not a run folder: {reason}; name the output_dir of a run")
    try:
        return config_file.load(path)
    except ConfigError as error:
        raise ConfigError(f"{path} is not a configuration of this version of lhcp:\n{error}") from None


def _last_checkpoint(run_dir: Path, now: float) -> tuple[CheckpointStatus | None, list[str]]:
    """The newest checkpoint that can be opened, and what is wrong with newer ones."""
    damaged = []
    for step in reversed(published(run_dir)):
        try:
            manifest = Checkpoint.open(step_folder(run_dir, step)).manifest
        except ConfigError as error:
            damaged.append(str(error))
            continue
        age = max(0.0, now - datetime.fromisoformat(manifest.created).timestamp())
        return CheckpointStatus(step=step, created=manifest.created, age_s=age), damaged
    return None, damaged


def _held_out(run_dir: Path, done: int) -> dict[str, HeldOutStatus]:
    """The last loss of each kind of evaluation among the first `done` steps."""
    try:
        events = read_events(run_dir)
    except FileNotFoundError:
        return {}
    # Steps that a restart takes back stay in the file until they are done again.
    counted = [event for event in events if event["event"].startswith(HELD_OUT) and event["step"] < done]
    return {event["event"]: HeldOutStatus(step=event["step"] + 1, loss=event["loss"]) for event in counted}


def _spans(config: RunConfig) -> list[range]:
    """The steps of each stage."""
    ends = list(accumulate(stage.steps for stage in config.stages))
    return [range(end - stage.steps, end) for stage, end in zip(config.stages, ends, strict=True)]


def _seconds_left(config: RunConfig, steps: Sequence[Record]) -> float:
    """Training time of the steps that come after `steps`, which are not none."""
    spans = _spans(config)
    own: dict[int, float] = {}
    for number, span in enumerate(spans):
        if times := [record["step_s"] for record in steps if record["step"] in span]:
            own[number] = median(times[-_TIMED:])
    done: int = steps[-1]["step"] + 1
    left = {number: span.stop - max(span.start, done) for number, span in enumerate(spans) if done < span.stop}
    return sum(count * _step_seconds(config, own, number) for number, count in left.items())


def _step_seconds(config: RunConfig, own: Mapping[int, float], number: int) -> float:
    """Time of a step of stage `number`: its own, or that of another stage in proportion to the arithmetic.

    Args:
        config: of the run.
        own: seconds by number of the stages that have run, at least one.
        number: of the stage, from 0.
    """
    if number in own:
        return own[number]
    mode = config.stages[number].mode
    like = max(own, key=lambda other: (config.stages[other].mode == mode, other))
    return own[like] * step_flops(config, mode) / step_flops(config, config.stages[like].mode)


def _duration(seconds: float) -> str:
    """In its two largest units, such as `3 h 20 min`."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86_400, "h", 3_600), ("h", 3_600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size:,} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"
