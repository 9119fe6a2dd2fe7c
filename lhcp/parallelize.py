"""Parallelism around a model that knows nothing of it: the mesh, and sums over its ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lhcp.config import ParallelConfig
from lhcp.distributed import ContextParallel


@dataclass(frozen=True)
class Mesh:
    """dp x cp ranks; context parallelism is innermost, so that its ranks are neighbours in a node."""

    context_parallel: ContextParallel
    dp_rank: int
    dp_size: int

    @classmethod
    def build(cls, config: ParallelConfig, device: torch.device) -> Mesh:
        """Of all processes of the default group (collective)."""
        assert config.dp is not None
        mesh = init_device_mesh(device.type, (config.dp, config.cp), mesh_dim_names=("dp", "cp"))
        cp = ContextParallel(mesh.get_group("cp"), config.sharding, config.exchange, config.block_backend)
        return cls(cp, mesh.get_local_rank("dp"), config.dp)


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of `x` over all dp x cp ranks (collective)."""
    x = x.clone()
    dist.all_reduce(x)
    return x


def sum_gradients(model: nn.Module) -> None:
    """Replace each gradient by its sum over all dp x cp ranks (collective).

    Every rank's loss is its tokens' sum over the *global* number of valid tokens, so a sum, never a mean, is the
    gradient of the global mean, whatever the layout.
    """
    works = []
    for parameter in model.parameters():
        assert parameter.grad is not None, "every parameter takes part in every step"
        works.append(dist.all_reduce(parameter.grad, async_op=True))
    for work in works:
        work.wait()
