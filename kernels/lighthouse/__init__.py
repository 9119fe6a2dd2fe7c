"""The device code of Lighthouse attention, each kernel beside its specification in `reference`."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lhcp.kernels.lighthouse import reference
from lhcp.kernels.lighthouse.pyramid import PyramidShape
from lhcp.kernels.lighthouse.reference import Bits, Triple

__all__ = ["Bits", "Kernels", "PyramidShape", "Triple", "kernels_for"]


class Kernels(Protocol):
    """The steps around attention; see `reference` for what each returns."""

    def pool(self, q: Tensor, k: Tensor, v: Tensor, shape: PyramidShape, *, scores: bool) -> tuple[Triple, Bits | None]:
        """What `gather` takes rows from, and the scores."""

    def score(self, x_BNHD: Tensor, num_kv_heads: int, shape: PyramidShape) -> Tensor:
        """Scores alone."""

    def select(
        self, query_bits_BGE: Tensor, key_bits_BGE: Tensor, shape: PyramidShape, strata: int, budget: int, cover: bool
    ) -> Tensor:
        """Which entries are gathered."""

    def gather(self, qkv: Triple, pooled: Triple, rows_BGS: Tensor, inverse_BGP: Tensor, shape: PyramidShape) -> Triple:
        """The sub-sequence."""

    def scatter_back(
        self,
        sub_BSHD: Tensor,
        rows_BGS: Tensor,
        inverse_BGP: Tensor,
        shape: PyramidShape,
        num_chunks: int,
        halo_CLBHD: Tensor | None,
    ) -> Tensor:
        """Rows back to positions."""


def kernels_for(x: Tensor) -> Kernels:
    """Triton's for half precision and float32 on CUDA; plain PyTorch for CPUs and for float64 everywhere.

    There is no falling back: on CUDA a failing kernel is an error.
    """
    if x.is_cuda and x.dtype != torch.float64:
        from lhcp.kernels.lighthouse import ops

        return ops
    return reference
