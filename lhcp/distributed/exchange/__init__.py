"""Exchanges: causal attention over sequence-sharded dense tensors, behind one interface.

An exchange computes forward and backward on plain tensors; `attend` makes it one torch op with a gradient. Adding one
means implementing `Exchange` and naming it in `make_exchange`.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
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


_local: dict[str, Exchange] = {}
# Owned by their `ContextParallel`, and by the graphs that await backward: process groups must not outlive them.
_shared: WeakValueDictionary[str, Exchange] = WeakValueDictionary()
_count = itertools.count()


def register(exchange: Exchange, backend: str) -> str:
    """A name under which `attend` finds `exchange`: its own, or that of all local ones with `backend`."""
    if isinstance(exchange, LocalExchange):
        _local[backend] = exchange
        return backend
    name = f"{type(exchange).__name__}-{next(_count)}"
    _shared[name] = exchange
    return name


def _named(name: str) -> Exchange:
    return _local[name] if name in _local else _shared[name]


def attend(q: Tensor, k: Tensor, v: Tensor, exchange: str) -> Tensor:
    """The exchange registered as `exchange`, as a differentiable function; see `Exchange` for shapes."""
    out: Tensor = torch.ops.lhcp.attend(q, k, v, exchange)[0]
    return out


# Opaque to torch.compile: it cannot trace point-to-point transfers, and must not order them anew. Outputs are
# contiguous, whatever a kernel makes, so that they have the strides that the fake implementations promise.


torch.library.define(
    "lhcp::attend",
    "(Tensor q, Tensor k, Tensor v, str exchange) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "lhcp::attend_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, str exchange) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl("lhcp::attend", "default")
def _attend(q: Tensor, k: Tensor, v: Tensor, exchange: str) -> tuple[Tensor, Tensor]:
    out, lse = _named(exchange).forward(q, k, v)
    return out.contiguous(), lse.contiguous()


def _attend_shapes(q: Tensor, k: Tensor, v: Tensor, exchange: str) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=dtype)


@torch.library.impl("lhcp::attend_backward", "default")
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, exchange: str
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _named(exchange).backward(grad, q, k, v, out, lse)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _attend_backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, exchange: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.exchange = inputs
    ctx.alive = _named(ctx.exchange)  # until backward, also where nobody else keeps it
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)  # none comes to the log-sum-exp


def _gradients(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor, Tensor, Tensor, None]:
    # A rank without a gradient joins the others' backward all the same.
    grad = torch.zeros_like(ctx.saved_tensors[3]) if grad is None else grad
    dq, dk, dv = torch.ops.lhcp.attend_backward(grad, *ctx.saved_tensors, ctx.exchange)
    return dq, dk, dv, None


torch.library.register_fake("lhcp::attend", _attend_shapes)
torch.library.register_fake("lhcp::attend_backward", _attend_backward_shapes)
torch.library.register_autograd("lhcp::attend", _gradients, setup_context=_save)
