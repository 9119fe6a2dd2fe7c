"""Scorers: whose rows say how much a token matters as a query and as a key. No gradient flows through a score.

A token's score is the L2 norm of its rows under a KV head. Scorer `norm` takes those of Q and K themselves.

The rows of `dilated` are one torch op: neither of its two exchanges needs the other, so that torch.compile, if it saw
them, might give them one order on one rank and another on the next, which would take one's messages for the other's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lhcp.distributed import ContextParallel
from lhcp.distributed.exchange.ops import named


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
    rows: tuple[Tensor, Tensor] = torch.ops.lhcp.dilated_rows(q_BNHD, k_BNGD, v_BNGD, dilation, cp.name)
    return rows


torch.library.define(
    "lhcp::dilated_rows",
    "(Tensor q, Tensor k, Tensor v, int dilation, str cp) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("lhcp::dilated_rows", "default")
def _dilated_rows(q: Tensor, k: Tensor, v: Tensor, dilation: int, cp: str) -> tuple[Tensor, Tensor]:
    attend, heads = named(cp, ContextParallel).attend, q.shape[2]
    k, v = (x.repeat_interleave(heads // k.shape[2], dim=2) for x in (k, v))
    q, k, v = (x.unflatten(1, (-1, dilation)).flatten(2, 3) for x in (q, k, v))

    def rows(queries: Tensor, keys: Tensor) -> Tensor:
        out: Tensor = attend(queries, keys, v).unflatten(2, (dilation, heads)).flatten(1, 2)
        return out.contiguous()

    return rows(q, k), rows(k, q)


def _shapes(q: Tensor, k: Tensor, v: Tensor, dilation: int, cp: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape)


torch.library.register_fake("lhcp::dilated_rows", _shapes)
