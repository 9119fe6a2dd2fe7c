"""Which checkpoint a run goes on from. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from lhcp.checkpoint.folder import published, step_folder
from lhcp.checkpoint.manifest import Checkpoint
from lhcp.config import ConfigError
from lhcp.files import DamagedError

LAST, LAST_GOOD = "last", "last-good"


def candidates(run_dir: Path, which: str) -> list[Path]:
    """Checkpoints to try, in order; none when the run has not published one, and so begins.

    Args:
        run_dir: the run folder, which need not exist.
        which: `last`, `last-good`, or a number of steps.

    Raises:
        ConfigError: `which` is none of these, or a number of steps without a checkpoint.
    """
    steps = published(run_dir)
    if which == LAST:
        steps = steps[-1:]
    elif which.isdecimal():
        if int(which) not in steps:
            valid = ", ".join([LAST, LAST_GOOD, *map(str, steps)])
            raise ConfigError(f"--resume {which}: {run_dir} has no checkpoint after {which} steps; valid: {valid}")
        steps = [int(which)]
    elif which != LAST_GOOD:
        raise ConfigError(f"--resume {which}: must be {LAST}, {LAST_GOOD} or the number of steps of a checkpoint")
    return [step_folder(run_dir, step) for step in reversed(steps)]


def first_readable(run_dir: Path, which: str) -> Checkpoint | None:
    """The checkpoint that `which` names, as far as manifests tell: the other files are not read.

    Raises:
        ConfigError: as for `candidates`.
        DamagedError: as for `advice`.
    """
    damage = []
    for folder in candidates(run_dir, which):
        try:
            return Checkpoint.open(folder)
        except DamagedError as error:
            damage.append(str(error))
            if which != LAST_GOOD:
                break
    if damage:
        raise DamagedError(advice(run_dir, which, damage))
    return None


def find_checkpoint(run: Path, step: int | None) -> Checkpoint:
    """The newest checkpoint in a run folder, or that after `step` steps; or the one in the folder `run` itself.

    Raises:
        ConfigError: there is none.
        DamagedError: its manifest is not what was written.
    """
    steps = published(run)
    if not run.is_dir():
        raise ConfigError(f"{run}: no such folder; name a run folder or a checkpoint")
    if not steps and (run / "config.yaml").exists():
        raise ConfigError(f"the run in {run} has no checkpoint yet")
    if step is None:
        return Checkpoint.open(step_folder(run, steps[-1]) if steps else run)
    if step not in steps:
        valid = ", ".join(map(str, steps)) or "none, it is no run folder with checkpoints"
        raise ConfigError(f"{run} has no checkpoint after {step} steps; valid: {valid}")
    return Checkpoint.open(step_folder(run, step))


def advice(run_dir: Path, which: str, damage: list[str]) -> str:
    """What to do when no checkpoint that `which` names is whole, `damage` being what is wrong with them."""
    if which == LAST_GOOD:
        return "\n".join([f"no checkpoint in {run_dir} is whole; choose another output_dir to start again", *damage])
    return f"{damage[0]}\ngo on from the newest whole checkpoint with --resume {LAST_GOOD}"
