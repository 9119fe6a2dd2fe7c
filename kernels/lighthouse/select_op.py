"""Selection as one torch op, whichever kernels make it.

Recomputation keeps its output by this name: selecting again would cost time and, where rounding differs between the
two runs, could choose other entries, and give gradients of something that was never computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lhcp.kernels.lighthouse import Bits, Kernels, PyramidShape, reference

torch.library.define(
    "lhcp::select",
    "(Tensor query_bits, Tensor key_bits, int tokens, int num_levels, int pooling_factor, int strata, int budget, "
    "bool cover, bool triton) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("lhcp::select", "default")
def _select(
    query_bits: Tensor,
    key_bits: Tensor,
    tokens: int,
    num_levels: int,
    pooling_factor: int,
    strata: int,
    budget: int,
    cover: bool,
    triton: bool,
) -> Tensor:
    shape = PyramidShape(tokens, num_levels, pooling_factor)
    if triton:
        from lhcp.kernels.lighthouse import ops

        return ops.select(query_bits, key_bits, shape, strata, budget, cover)
    return reference.select(query_bits, key_bits, shape, strata, budget, cover)


def _select_shape(
    query_bits: Tensor,
    key_bits: Tensor,
    tokens: int,
    num_levels: int,
    pooling_factor: int,
    strata: int,
    budget: int,
    cover: bool,
    triton: bool,
) -> Tensor:
    coarsest = PyramidShape(tokens, num_levels, pooling_factor).sizes[-1]
    slots = coarsest + (num_levels - 1) * pooling_factor * budget * strata
    return query_bits.new_empty(*query_bits.shape[:2], slots, dtype=torch.int32)


torch.library.register_fake("lhcp::select", _select_shape)


def select_rows(kernels: Kernels, bits: Bits, shape: PyramidShape, strata: int, budget: int, cover: bool) -> Tensor:
    """See `reference.select`."""
    out: Tensor = torch.ops.lhcp.select(
        *bits, shape.length, shape.num_levels, shape.pooling_factor, strata, budget, cover, kernels is not reference
    )
    return out
