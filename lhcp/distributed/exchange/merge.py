"""Blocks of one row's attention become one, by their log-sum-exps, and so do the gradients of blocks, by addition."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out: Tensor, lse: Tensor, new: Tensor, new_lse: Tensor) -> None:
    """Fold a block's output and log-sum-exp into `out` and `lse`, in place.

    Args:
        out: [B, n, H, D] in the accumulation dtype.
        lse: [B, H, n], finite, in the accumulation dtype.
        new: [B, n, H, D] in any dtype.
        new_lse: [B, H, n].
    """
    if out.is_cuda and out.dtype == torch.float32:
        from lhcp.distributed.exchange.merge_kernel import merge_in_one_pass

        merge_in_one_pass(out, lse, new, new_lse)
        return
    total = torch.logaddexp(lse, new_lse)
    out *= (lse - total).exp().transpose(1, 2).unsqueeze(-1)
    out += new * (new_lse - total).exp().transpose(1, 2).unsqueeze(-1)
    lse.copy_(total)


def add(out: Tensor, x: Tensor, y: Tensor) -> None:
    """Put x + y into `out`, which may be one of them, rounded once.

    Args:
        out: [B, n, H, D] in any dtype, D contiguous.
        x: likewise.
        y: likewise.
    """
    if out.is_cuda and torch.promote_types(x.dtype, y.dtype) == torch.float32:
        from lhcp.distributed.exchange.merge_kernel import add_in_one_pass

        add_in_one_pass(out, x, y)
        return
    torch.add(x, y, out=out)
