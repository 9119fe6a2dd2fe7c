"""Writing the checkpoints of a run while training goes on."""

from __future__ import annotations

import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_saver import async_save

from lhcp.checkpoint.folder import FOLDER, prune, remove_leftovers, step_folder
from lhcp.checkpoint.manifest import Manifest
from lhcp.checkpoint.storage import CheckpointWriter

MAX_FAILURES = 3
"""Saves in a row that have failed when a run ends."""


@dataclass(frozen=True)
class Saved:
    """How a save ended."""

    step: int
    """The checkpoint is that after so many steps."""
    seconds: float
    """From the copy of the tensors until it was published."""
    error: str | None
    """Why there is no such checkpoint."""


class Saver:
    """Copies tensors to host memory, then writes them in a thread; every rank has one (collective).

    Args:
        run_dir: the run folder, which exists; it is not made again when someone removes it.
        keep: newest checkpoints that are kept.
        device: where the tensors are.
        timeout: for ranks to wait for each other in a save. None: torch's default.
    """

    def __init__(self, run_dir: Path, keep: int, device: torch.device, timeout: timedelta | None = None) -> None:
        self._run_dir, self._keep = run_dir, keep
        # Collectives of a thread must not mix with those of training.
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        # On a GPU into pinned memory, kept for the next save. DefaultStager cannot stage twice in torch 2.11.
        self._stager = BlockingAsyncStager(cache_staged_state_dict=device.type == "cuda")
        self._pending: tuple[int, Future[object], Future[float]] | None = None
        """Its step, its save, and when that ended, which is before it is collected."""
        self._failures = 0
        self.last_error: str | None = None
        """Why the save that was collected last has failed."""

    def start(self, tensors: dict[str, Tensor], manifest: Manifest) -> None:
        """Begin the checkpoint after `manifest.step` steps. When this returns, the tensors may change again."""
        assert self._pending is None, "collect the save before first"
        folder = step_folder(self._run_dir, manifest.step)
        started = time.perf_counter()
        with suppress(OSError):  # whatever is wrong, writing will say
            folder.parent.mkdir(exist_ok=True)
        writer = CheckpointWriter(folder, dist.get_rank(), manifest, on_published=self._prune)
        future = async_save(tensors, storage_writer=writer, process_group=self._group, async_stager=self._stager)
        assert isinstance(future, Future)
        seconds: Future[float] = Future()
        future.add_done_callback(lambda _: seconds.set_result(time.perf_counter() - started))
        self._pending = manifest.step, future, seconds

    def collect(self, block: bool = False) -> Saved | None:
        """How the save that was begun has ended; None when there is none, or it goes on and `block` is false."""
        if self._pending is None or not (block or self._pending[2].done()):
            return None
        step, future, seconds = self._pending
        self._pending, error = None, None
        try:
            future.result()
        except CheckpointException as failure:
            error = _reason(failure)
            if dist.get_rank() == 0:
                remove_leftovers(self._run_dir)  # every rank has stopped writing; a full disk needs the room
        self._failures = self._failures + 1 if error else 0
        self.last_error = error
        return Saved(step, seconds.result(), error)

    @property
    def failed(self) -> bool:
        """Whether too many saves in a row have failed: the same on every rank once they have collected the same."""
        return self._failures >= MAX_FAILURES

    def _prune(self) -> None:
        prune(self._run_dir / FOLDER, self._keep)


def _reason(failure: CheckpointException) -> str:
    """What the storage said, of the first rank that it failed; anything else is a defect and is raised."""
    rank, (error, _) = min(failure.failures.items())
    if not isinstance(error, OSError | SafetensorError):
        raise RuntimeError(f"rank {rank} failed to save") from failure
    return f"rank {rank}: {error}"
