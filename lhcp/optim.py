"""AdamW and its schedule."""

from __future__ import annotations

import torch
from torch import nn

from lhcp.config import OptimConfig


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=matrices[0].is_cuda,  # one pass over each tensor
    )


def learning_rate(config: OptimConfig, step: int) -> float:
    """Of step `step` (from 0): linear warm-up to `lr`, then constant."""
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup_steps))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """In every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
