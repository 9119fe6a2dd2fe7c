"""Exchanges: causal attention over sequence-sharded dense tensors, behind one interface, `Attend`.

To add one, implement `Exchange` (forward and backward on plain tensors), or `Attend` of differentiable ops, and name it
in `make_attend` and in `lhcp.config.ExchangeName`.
"""

from __future__ import annotations

from functools import cache
from typing import get_args

from torch.distributed import ProcessGroup

from lhcp.config import BlockBackendName, ConfigError, ExchangeName
from lhcp.distributed.communicator import Communicator
from lhcp.distributed.exchange.all_gather import AllGatherExchange
from lhcp.distributed.exchange.block import check_block_backend
from lhcp.distributed.exchange.local import LocalExchange
from lhcp.distributed.exchange.ops import Attend, Exchange, OpaqueExchange
from lhcp.distributed.exchange.ring import RingExchange
from lhcp.distributed.exchange.ring_flash_attn import PackageExchange
from lhcp.distributed.exchange.ulysses import UlyssesExchange
from lhcp.distributed.sharding import ChunkLayout

__all__ = ["Attend", "Exchange", "make_attend"]


def make_attend(
    name: ExchangeName,
    communicator: Communicator | None,
    group: ProcessGroup | None,
    layout: ChunkLayout,
    backend: BlockBackendName,
) -> Attend:
    """Attention by the exchange `name`, for this rank; that of one rank at a degree of 1.

    Args:
        name: of the exchange.
        communicator: None at a degree of 1.
        group: for an exchange of another package.
        layout: which rank holds which tokens.
        backend: kernel of one attention block.

    Raises:
        ConfigError: unknown name of an exchange or a block backend; a package is missing, or cannot take the layout.
    """
    check_block_backend(backend)
    if name not in get_args(ExchangeName):
        raise ConfigError(f"exchange {name!r}: valid are {list(get_args(ExchangeName))}")
    if layout.world == 1:
        return _local(backend)
    assert communicator is not None
    if name == "ulysses":
        return UlyssesExchange(communicator, layout, _local(backend))
    if name == "ring_flash_attn":
        return OpaqueExchange(PackageExchange(group, layout))
    kind = RingExchange if name == "ring" else AllGatherExchange
    return OpaqueExchange(kind(communicator, layout, backend))


@cache
def _local(backend: BlockBackendName) -> OpaqueExchange:
    """One for all: a compiled function is compiled again for another."""
    return OpaqueExchange(LocalExchange(backend), backend)
