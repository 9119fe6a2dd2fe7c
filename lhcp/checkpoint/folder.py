"""The checkpoints of a run as folders: `RUN/checkpoints/step-00000100`, after 100 steps. Imports no torch.

A name that begins with a dot is of one that is being written or removed. Publishing and removing are renames, so a
reader sees a whole checkpoint or none.
"""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path

FOLDER = "checkpoints"
"""In a run folder."""
_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.step-\d{8,}\.(tmp|old)")


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is, or will be."""
    return run_dir / FOLDER / f"step-{step:08d}"


def unpublished(folder: Path) -> Path:
    """Where the checkpoint `folder` is written before it is published."""
    return folder.with_name(f".{folder.name}.tmp")


def published(run_dir: Path) -> list[int]:
    """Steps of the published checkpoints of a run, ascending; whether they are whole is not looked at."""
    return [step for step, _ in _published(run_dir / FOLDER)]


def prune(folder: Path, keep: int) -> None:
    """Remove all published checkpoints in `folder` but the newest `keep`. What cannot be removed stays."""
    for _, checkpoint in _published(folder)[:-keep]:
        removed = checkpoint.with_name(f".{checkpoint.name}.old")
        with suppress(OSError):
            checkpoint.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a process that was killed left half written or half removed. No other may be writing."""
    for entry in _entries(run_dir / FOLDER):
        if _LEFTOVER.fullmatch(entry.name):
            shutil.rmtree(entry, ignore_errors=True)


def set_aside(run_dir: Path, after: int) -> list[Path]:
    """Rename published checkpoints of more than `after` steps, so that the run can go on from there; the new names."""
    renamed = []
    for step, checkpoint in _published(run_dir / FOLDER):
        if step > after:
            taken = len(list(checkpoint.parent.glob(f"set-aside-*-{checkpoint.name}")))
            renamed.append(checkpoint.rename(checkpoint.with_name(f"set-aside-{taken + 1}-{checkpoint.name}")))
    return renamed


def _published(folder: Path) -> list[tuple[int, Path]]:
    return sorted((int(match[1]), entry) for entry in _entries(folder) if (match := _NAME.fullmatch(entry.name)))


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
