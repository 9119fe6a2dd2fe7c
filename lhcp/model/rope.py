"""Rotary position embedding (Su et al., arXiv:2104.09864), in the half-split layout of Hugging Face's Llama."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(positions_N: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [N, 1, D / 2], of the angle position * theta^(-2i / D).

    The angles are computed in float64: at a position of 1M a float32 angle is wrong by up to 0.06 rad.

    Args:
        positions_N: int64, global positions.
        dtype: of the tables, at least float32.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_N.device) / head_dim
    angles = torch.outer(positions_N.double(), theta**-exponent).unsqueeze(1)
    dtype = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x_BNHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of every head; computed in the tables' dtype, returned in x's."""
    first, second = x_BNHD.to(cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_BNHD.dtype)
