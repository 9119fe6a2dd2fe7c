"""Which attention each layer of a model runs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lhcp.attention.lighthouse import lighthouse_attention
from lhcp.config import LighthouseConfig
from lhcp.distributed import ContextParallel


@dataclass(frozen=True)
class LayerAttention:
    """Lighthouse attention, except in `dense_layers`; dense everywhere without a configuration."""

    context_parallel: ContextParallel
    lighthouse: LighthouseConfig | None
    dense_layers: frozenset[int] = frozenset()
    valid_len: int | None = None
    """Tokens of a sequence before its padding; None: it has none. Dense attention is causal, and need not know."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of `layer` over this rank's shards; shapes as in `ContextParallel.attend`."""
        if self.lighthouse is None or layer in self.dense_layers:
            return self.context_parallel.attend(q, k, v)
        return lighthouse_attention(
            q, k, v, self.lighthouse, context_parallel=self.context_parallel, valid_len=self.valid_len
        )
