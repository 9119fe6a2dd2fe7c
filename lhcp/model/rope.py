"""Rotary position embedding (Su et al., arXiv:2104.09864), in the half-split layout of Hugging Face's Llama."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lhcp.config import Llama3RopeScaling, RopeScaling


def rope_tables(
    positions_N: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [N, 1, D / 2], of the angle position * theta^(-2i / D), the frequency scaled if asked for.

    The angles are computed in float64: at a position of 1M a float32 angle is wrong by up to 0.06 rad.

    Args:
        positions_N: int64, global positions.
        dtype: of the tables, at least float32.
        scaling: of the frequencies.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_N.device) / head_dim
    angles = torch.outer(positions_N.double(), _scaled(theta**-exponent, scaling)).unsqueeze(1)
    dtype = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _scaled(frequencies: Tensor, scaling: RopeScaling | None) -> Tensor:
    """Angles per position, float64 [D / 2].

    `linear` is position interpolation (Chen et al., arXiv:2306.15595), `llama3` is `apply_scaling` in
    models/llama3/model.py of github.com/meta-llama/llama-models, its three cases joined by clamping.
    """
    if scaling is None:
        return frequencies
    if isinstance(scaling, Llama3RopeScaling):
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        waves = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # in the original context
        kept = ((waves - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / scaling.factor)
    return frequencies / scaling.factor


def apply_rope(x_BNHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of every head; computed in the tables' dtype, returned in x's."""
    first, second = x_BNHD.to(cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x_BNHD.dtype)
