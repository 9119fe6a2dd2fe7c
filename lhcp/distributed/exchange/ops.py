"""Exchanges as torch ops with gradients.

Opaque to torch.compile: it cannot trace point-to-point transfers, and must not order them anew. An op finds its
exchange by a name. Outputs are contiguous, whatever a kernel makes, so that they have the strides that the fake
implementations promise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

T = TypeVar("T")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention over shards, differentiable: q [B, n, H, D], k and v [B, n, G, D] -> [B, n, H, D]."""


class Exchange(Protocol):
    """Causal attention over shards, forward and backward; shapes as for `Attend`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Output [B, n, H, D] in q's dtype and log-sum-exp [B, H, n] in the accumulation dtype."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, in their shapes and dtypes."""


# Owned by their `ContextParallel`, and by the graphs that await backward: process groups must not outlive them.
_registered: WeakValueDictionary[str, Any] = WeakValueDictionary()
_count = itertools.count()


def register(value: Any, name: str | None = None) -> str:
    """A name under which ops find `value`, as long as somebody holds it."""
    name = name or f"{type(value).__name__}-{next(_count)}"
    _registered[name] = value
    return name


def named(name: str, kind: type[T]) -> T:
    """What is registered under a name."""
    value = _registered[name]
    assert isinstance(value, kind)
    return value


class OpaqueExchange:
    """An `Exchange` as one torch op with a gradient: an `Attend`."""

    def __init__(self, exchange: Exchange, name: str | None = None) -> None:
        self._exchange = exchange
        self.name = register(exchange, name)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        out: Tensor = torch.ops.lhcp.attend(q, k, v, self.name)[0]
        return out


_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define("lhcp::attend", "(Tensor q, Tensor k, Tensor v, str exchange) -> (Tensor, Tensor)", tags=_TAGS)
torch.library.define(
    "lhcp::attend_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, str exchange) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


def _exchange(name: str) -> Exchange:
    exchange: Exchange = _registered[name]
    return exchange


@torch.library.impl("lhcp::attend", "default")
def _attend(q: Tensor, k: Tensor, v: Tensor, exchange: str) -> tuple[Tensor, Tensor]:
    out, lse = _exchange(exchange).forward(q, k, v)
    return out.contiguous(), lse.contiguous()


def _attend_shapes(q: Tensor, k: Tensor, v: Tensor, exchange: str) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=dtype)


@torch.library.impl("lhcp::attend_backward", "default")
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, exchange: str
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _exchange(exchange).backward(grad, q, k, v, out, lse)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _attend_backward_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, exchange: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.exchange = inputs
    ctx.alive = _exchange(ctx.exchange)  # until backward, also where nobody else keeps it
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
