"""Reading what runs have saved."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lhcp.checkpoint.folder import step_folder
from lhcp.checkpoint.index import read_index
from lhcp.checkpoint.manifest import Checkpoint
from lhcp.checkpoint.storage import read_tensor


def read_all(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole."""
    index = read_index(checkpoint)
    return {name: read_tensor(checkpoint, index, name) for name in index}


def published_tensors(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Those of the checkpoint after `step` steps, after comparing its files with their checksums."""
    checkpoint = Checkpoint.open(step_folder(run_dir, step))
    checkpoint.verify()
    return read_all(checkpoint)
