"""Cross-entropy against a large vocabulary without the N x vocabulary logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lhcp.data import IGNORE


def linear_cross_entropy(hidden_BNE: Tensor, weight_VE: Tensor, labels_BN: Tensor, chunk: int = 4096) -> Tensor:
    """Sum of the cross-entropies, in nats, of `hidden @ weight.T` against the labels that are not `IGNORE`.

    Logits exist for `chunk` positions at a time, in float32 (float64 for float64 input), and are computed again
    in backward. (`F.linear_cross_entropy` would return the sum in the input's dtype: three digits in bfloat16.)

    Returns:
        A scalar in the logits' dtype; 0 when no label counts.
    """
    hidden, labels = hidden_BNE.flatten(0, 1), labels_BN.flatten()
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for rows, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        total = total + checkpoint(_chunk_loss, rows, weight_VE, targets, use_reentrant=False)
    return total


def _chunk_loss(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(rows, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
