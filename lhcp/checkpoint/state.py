"""What a checkpoint holds of a model and its optimizer, as tensors by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from lhcp.checkpoint.manifest import Checkpoint
from lhcp.checkpoint.storage import CheckpointReader

_MOMENTS = ("exp_avg", "exp_avg_sq")


def state_tensors(model: nn.Module, optimizer: torch.optim.AdamW | None) -> dict[str, Tensor]:
    """Parameters as `model.NAME`, AdamW's moments as `optimizer.MOMENT.NAME`."""
    parameters = dict(model.named_parameters())
    tensors: dict[str, Tensor] = {f"model.{name}": p.detach() for name, p in parameters.items()}
    if optimizer is not None:
        for moment in _MOMENTS:
            tensors |= {f"optimizer.{moment}.{name}": optimizer.state[p][moment] for name, p in parameters.items()}
    return tensors


def create_moments(optimizer: torch.optim.AdamW) -> None:
    """Give a fresh optimizer its state, all zero, as its own first step would; weights stay as they are."""
    lrs = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    set_optimizer_steps(optimizer, 0)


def set_optimizer_steps(optimizer: torch.optim.AdamW, steps: int) -> None:
    """The number of updates that AdamW corrects the bias of its moments for."""
    for state in optimizer.state.values():
        state["step"].fill_(steps)


def load(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.AdamW | None) -> None:
    """Fill the model, and the optimizer if given, from a checkpoint of any layout (collective).

    Raises:
        DamagedError: its index is not what was written.
    """
    dcp_load(state_tensors(model, optimizer), storage_reader=CheckpointReader(checkpoint))
    if optimizer is not None:
        set_optimizer_steps(optimizer, checkpoint.manifest.optimizer_steps)
