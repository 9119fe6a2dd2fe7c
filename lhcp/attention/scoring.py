"""Scorers: how much a token matters as a query and as a key. No gradient flows through a score."""

from __future__ import annotations

import torch
from torch import Tensor

from lhcp.distributed import ContextParallel
from lhcp.kernels.lighthouse import reference


@torch.no_grad()
def norm_scores(q_BNHD: Tensor, k_BNGD: Tensor) -> tuple[Tensor, Tensor]:
    """Scorer `norm`: L2 norms of the rows; a KV head's query score is the norm of its query heads' stacked rows.

    Returns:
        Query and key scores, [B, G, N] in float32 (float64 for float64 input).
    """
    num_kv_heads = k_BNGD.shape[2]
    return reference.row_norms(q_BNHD, num_kv_heads), reference.row_norms(k_BNGD, num_kv_heads)


@torch.no_grad()
def dilated_scores(
    q_BNHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor, dilation: int, cp: ContextParallel
) -> tuple[Tensor, Tensor]:
    """Scorer `dilated`: norms of the outputs of causal attention among every `dilation`-th token (collective).

    The groups of tokens are extra heads. Query scores come from attend(Q, K, V), key scores from
    attend(K, Q, V), per query head with K and V repeated; a KV head's score stacks its heads' rows.

    Returns:
        Query and key scores, [B, G, N] in float32 (float64 for float64 input).
    """
    heads, num_kv_heads = q_BNHD.shape[2], k_BNGD.shape[2]
    k, v = (x.repeat_interleave(heads // num_kv_heads, dim=2) for x in (k_BNGD, v_BNGD))
    q, k, v = (x.unflatten(1, (-1, dilation)).flatten(2, 3) for x in (q_BNHD, k, v))

    def score(queries: Tensor, keys: Tensor) -> Tensor:
        out = cp.attend(queries, keys, v).unflatten(2, (dilation, heads)).flatten(1, 2)
        return reference.row_norms(out, num_kv_heads)

    return score(q, k), score(k, q)
