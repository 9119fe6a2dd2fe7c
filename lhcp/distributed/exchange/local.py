"""The exchange of a single rank: one causal block."""

from __future__ import annotations

from torch import Tensor

from lhcp.config import BlockBackendName
from lhcp.distributed.exchange.block import block_backend


class LocalExchange:
    """Causal attention where one rank holds whole sequences."""

    def __init__(self, backend: BlockBackendName) -> None:
        self._backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `Exchange.forward`."""
        return block_backend(self._backend, q).forward(q, k, v, causal=True)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Exchange.backward`."""
        return block_backend(self._backend, q).backward(grad, q, k, v, out, lse, causal=True)
