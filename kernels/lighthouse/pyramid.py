"""Geometry of the pyramid: which flat index is which entry. Pure integer arithmetic.

An entry (l, i) covers tokens [i p^l, (i+1) p^l). Its flat index is offset(l) + i, levels following each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class PyramidShape:
    """The pyramid over `length` tokens, which p^(L-1) divides."""

    length: int
    num_levels: int
    pooling_factor: int

    @property
    def sizes(self) -> list[int]:
        """Entries of each level."""
        return [self.length // self.pooling_factor**level for level in range(self.num_levels)]

    @property
    def offsets(self) -> list[int]:
        """Flat index of each level's first entry, and the total at the end."""
        return [0, *accumulate(self.sizes)]

    def flatten(self, level: Tensor, index: Tensor) -> Tensor:
        """Flat index of entries (level, index)."""
        # Sums, not a table: making a tensor from numbers would wait for the GPU.
        for finer, size in enumerate(self.sizes[:-1]):
            index = index + (level > finer) * size
        return index

    def unflatten(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """(level, index) of flat indices, int64."""
        level, index = torch.zeros_like(flat, dtype=torch.int64), flat.long()
        for offset, size in zip(self.offsets[1:-1], self.sizes[:-1], strict=True):
            level, index = level + (flat >= offset), index - (flat >= offset) * size
        return level, index
