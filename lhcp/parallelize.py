"""What is done to a model that knows nothing of it: layers recomputed, compiled, offloaded; parameters sharded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lhcp.config import ParallelConfig, RecomputeMode, RunConfig
from lhcp.distributed import ContextParallel
from lhcp.model.llama import Block, Llama
from lhcp.offload import Forward, InputOffload

Function = TypeVar("Function", bound=Callable[..., Any])


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


def prepare_layers(model: Llama, config: RunConfig, device: torch.device) -> None:
    """Recomputation, compilation and offload of a model's layers, and compilation of its loss, in place.

    All of it lies inside the layers' `forward`, within the hooks that `shard_model` adds.
    """
    memory = config.memory
    compiled = config.compiles(device.type)
    offload = InputOffload(memory.offload_layers, device) if memory.offload_layers else None
    kept = _compiled(Block.forward) if compiled else Block.forward
    again = _recomputed(memory.recompute)
    again = _compiled(again) if compiled else again
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        # One function for all layers, which is compiled once: a block is an argument.
        forward: Forward = partial(again if layer < config.recomputed_layers else kept, block)
        if offload is not None and layer <= memory.offload_layers:
            forward = offload.around(layer, forward)
        block.forward = forward  # type: ignore[method-assign]
    if compiled:
        # It warns of ops in place under recomputation, of which a layer has none.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        model.loss_and_gradient = _compiled(model.loss_and_gradient)


def _compiled(function: Function) -> Function:
    return torch.compile(function, fullgraph=True, dynamic=False)  # type: ignore[return-value]


def _recomputed(mode: RecomputeMode) -> Forward:
    """`Block.forward` that keeps its input and, of what it computes, what it selected and, if `selective`, attended.

    And the halo, which is small: to ask the other ranks for it again would be to wait for the slowest again.
    """
    kept = [torch.ops.lhcp.select.default, torch.ops.lhcp.halo.default]
    kept += [torch.ops.lhcp.attend.default] if mode == "selective" else []

    def forward(block: Block, *args: Any) -> Tensor:
        contexts = partial(create_selective_checkpoint_contexts, kept)
        out: Tensor = checkpoint(Block.forward, block, *args, use_reentrant=False, context_fn=contexts)
        return out

    return forward


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
    register_fsdp_forward_method(model, "logits")


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
