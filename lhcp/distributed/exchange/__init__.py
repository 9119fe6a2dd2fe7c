"""Exchanges: causal attention over sequence-sharded dense tensors, behind one interface.

An exchange computes forward and backward on plain tensors; `attend` makes it one autograd node. Adding one
means implementing `Exchange` and naming it in `make_exchange`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from lhcp.config import BlockBackendName, ConfigError, ExchangeName
from lhcp.distributed.exchange.block import check_block_backend
from lhcp.distributed.exchange.local import LocalExchange
from lhcp.distributed.exchange.ring import RingExchange
from lhcp.distributed.sharding import ChunkLayout


class Exchange(Protocol):
    """Causal attention over shards; q is [B, n, H, D], k and v are [B, n, G, D] with G dividing H."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output [B, n, H, D] in q's dtype and log-sum-exp [B, H, n] in the accumulation dtype."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, in their shapes and dtypes."""


def make_exchange(
    name: ExchangeName, group: ProcessGroup | None, layout: ChunkLayout, rank: int, backend: BlockBackendName
) -> Exchange:
    """The exchange `name` for this rank; a local one at a degree of 1.

    Raises:
        ConfigError: unknown name of an exchange or a block backend.
    """
    check_block_backend(backend)
    if name != "ring":
        raise ConfigError(f"exchange {name!r}: valid is 'ring'")
    if layout.world == 1:
        return LocalExchange(backend)
    assert group is not None
    return RingExchange(group, layout, rank, backend)


def attend(exchange: Exchange, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`exchange` as a differentiable function; see `Exchange` for shapes."""
    out: Tensor = _Attend.apply(exchange, q, k, v)  # type: ignore[no-untyped-call]
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = exchange.forward(q, k, v)
        ctx.exchange = exchange
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        return None, *ctx.exchange.backward(grad, *ctx.saved_tensors)
