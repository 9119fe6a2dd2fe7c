"""The ranks of a run choose a checkpoint together, and check it together: each reads its share of the files."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from lhcp.checkpoint.manifest import Checkpoint
from lhcp.checkpoint.resume import LAST_GOOD, advice, candidates
from lhcp.distributed.collectives import SharedError, complaints, on_rank_zero
from lhcp.metrics import warn


def choose(run_dir: Path, which: str) -> Checkpoint | None:
    """The checkpoint that `which` names (see `candidates`), whole; None: the run begins (collective).

    Raises:
        SharedError: there is none of that name, or none that is whole.
    """
    problems = []
    for folder in on_rank_zero(lambda: candidates(run_dir, which)):
        found = damage(folder)
        if not found:
            return Checkpoint.open(folder)
        problems.append(found[0])
        if which != LAST_GOOD:
            break
        if dist.get_rank() == 0:
            warn(found[0])
    if problems:
        raise SharedError(advice(run_dir, which, problems))
    return None


def damage(folder: Path) -> list[str]:
    """What is wrong with the checkpoint in `folder`; nothing when every byte is as it was written (collective)."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def verify_share() -> None:
        checkpoint = Checkpoint.open(folder)
        checkpoint.verify(sorted(checkpoint.manifest.files)[rank::world])

    return complaints(verify_share)
