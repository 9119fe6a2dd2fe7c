"""Which attention each layer of a model runs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from torch import Tensor

from lhcp.attention.lighthouse import lighthouse_attention
from lhcp.config import LighthouseConfig
from lhcp.distributed import ContextParallel

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [B, N, H, D], k [B, N, G, D], v [B, N, G, D] -> [B, N, H, D]."""


def layer_attentions(
    num_layers: int,
    cp: ContextParallel,
    lighthouse: LighthouseConfig | None,
    dense_layers: Collection[int] = (),
    valid_len: int | None = None,
) -> list[AttentionFunction]:
    """Lighthouse attention for every layer, but dense for `dense_layers`; dense for all without a configuration.

    Args:
        num_layers: how many.
        cp: the ranks that share the sequences.
        lighthouse: resolved.
        dense_layers: by number.
        valid_len: tokens of a sequence before its padding; None: it has none. Dense attention is causal, and need not
            know.
    """
    dense = cp.attend
    if lighthouse is None:
        return [dense] * num_layers
    # One object for all layers: a layer is compiled anew for another.
    sparse = partial(lighthouse_attention, cfg=lighthouse, context_parallel=cp, valid_len=valid_len)
    return [dense if layer in dense_layers else sparse for layer in range(num_layers)]
