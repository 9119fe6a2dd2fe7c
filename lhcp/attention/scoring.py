"""Scorers: whose rows say how much a token matters as a query and as a key. No gradient flows through a score.

A token's score is the L2 norm of its rows under a KV head. Scorer `norm` takes those of Q and K themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lhcp.distributed import ContextParallel


@torch.no_grad()
def dilated_rows(
    q_BNHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor, dilation: int, cp: ContextParallel
) -> tuple[Tensor, Tensor]:
    """Scorer `dilated`: the outputs of causal attention among every `dilation`-th token (collective).

    The groups of tokens are extra heads. Query scores come from attend(Q, K, V), key scores from
    attend(K, Q, V), per query head with K and V repeated.

    Returns:
        The rows to score for queries and for keys, [B, N, H, D] each.
    """
    heads, num_kv_heads = q_BNHD.shape[2], k_BNGD.shape[2]
    k, v = (x.repeat_interleave(heads // num_kv_heads, dim=2) for x in (k_BNGD, v_BNGD))
    q, k, v = (x.unflatten(1, (-1, dilation)).flatten(2, 3) for x in (q_BNHD, k, v))

    def rows(queries: Tensor, keys: Tensor) -> Tensor:
        out: Tensor = cp.attend(queries, keys, v).unflatten(2, (dilation, heads)).flatten(1, 2)
        return out

    return rows(q, k), rows(k, q)
