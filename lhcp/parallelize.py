"""Parallelism around a model that knows nothing of it: the mesh, sharded parameters, sums over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lhcp.attention.tape import checkpoint_contexts
from lhcp.config import ParallelConfig, RecomputeMode
from lhcp.distributed import ContextParallel
from lhcp.model.llama import Block, Llama


@dataclass(frozen=True)
class Mesh:
    """dp x cp ranks; context parallelism is innermost, so that its ranks are neighbours in a node."""

    context_parallel: ContextParallel
    dp_rank: int
    dp_size: int
    ranks: DeviceMesh
    """All dp x cp ranks in one dimension: what parameters are sharded over."""

    @classmethod
    def build(cls, config: ParallelConfig, device: torch.device, timeout: timedelta | None = None) -> Mesh:
        """Of all processes of the default group (collective).

        Args:
            config: resolved.
            device: of this process.
            timeout: limit for one collective. None: torch's default, which is not that of the default group.
        """
        assert config.dp is not None
        mesh = init_device_mesh(device.type, (config.dp, config.cp), mesh_dim_names=("dp", "cp"))
        if timeout is not None:
            for group in mesh.get_all_groups():
                dist.distributed_c10d._set_pg_timeout(timeout, group)
        cp = ContextParallel(mesh.get_group("cp"), config.sharding, config.exchange, config.block_backend)
        ranks = init_device_mesh(device.type, (config.dp * config.cp,), mesh_dim_names=("ranks",))
        return cls(cp, mesh.get_local_rank("dp"), config.dp, ranks)


def recompute(model: Llama, mode: RecomputeMode) -> None:
    """Activation checkpointing, in place: drop activations in forward and compute them again in backward.

    A layer that is recomputed attends with the entries that its forward pass selected.
    """
    for block in model.blocks:
        assert isinstance(block, Block)
        if mode == "full":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=checkpoint_contexts)  # type: ignore[method-assign]
        elif mode == "selective":
            half = block.feed_forward
            half.forward = partial(checkpoint, half.forward, use_reentrant=False)  # type: ignore[method-assign]


def shard_model(model: Llama, mesh: Mesh, compute_dtype: torch.dtype) -> None:
    """Shard parameters, gradients and optimizer state over all dp x cp ranks (FSDP2), in place.

    Parameters keep their dtype and are cast to `compute_dtype` where they are gathered; gradients are summed over
    ranks in the parameters' dtype. Every rank's loss is its tokens' sum over the *global* number of valid tokens,
    so a sum, never a mean, is the gradient of the global mean, whatever the layout.
    """
    stored = model.output.weight.dtype
    # Inputs are left alone: RoPE tables must not be rounded to the compute dtype.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=stored, cast_forward_inputs=False)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh.ranks, mp_policy=policy)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # else float32 asks for a scaled sum, which gloo has not


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of `x` over all dp x cp ranks (collective)."""
    x = x.clone()
    dist.all_reduce(x)
    return x


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether any rank says so, the same answer on every rank (collective)."""
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)))


def full(x: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank (collective); any other tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x
