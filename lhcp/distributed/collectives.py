"""Collectives in the one form that this project uses."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def all_gather(x: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Every rank's `x` (same shape and dtype everywhere), by rank."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return parts
