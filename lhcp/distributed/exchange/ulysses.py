"""Ulysses: attention of whole sequences, a share of the heads on each rank (Jacobs et al., arXiv:2309.14509).

An all-to-all turns q, k and v of [B, n, H, D] (my tokens, all heads) into those of [B, N, H / W, D] (all tokens, my
heads), and another turns the output back. Between them is the attention of one rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lhcp.config.parallel import ulysses_copies
from lhcp.distributed.communicator import Communicator
from lhcp.distributed.exchange.ops import Attend, named, register
from lhcp.distributed.order import joined, parted
from lhcp.distributed.sharding import ChunkLayout


class UlyssesExchange:
    """Causal attention by two all-to-alls; KV heads are replicated where there are fewer of them than ranks.

    A rank sends (W - 1) / W of q, of k and v (at least W heads of them) and of the output in forward, and as much of
    their gradients in backward.
    """

    def __init__(self, communicator: Communicator, layout: ChunkLayout, local: Attend) -> None:
        self._swap = HeadSwap(communicator, layout)
        self._name = register(self._swap)
        self._local = local

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`.

        Raises:
            ConfigError: heads that cannot be shared among the ranks.
        """
        copies = ulysses_copies(self._swap.world, q.shape[2], k.shape[2])
        out: Tensor = self._local(*torch.ops.lhcp.share_heads(q, k, v, copies, self._name))
        return torch.ops.lhcp.unite_heads(out, self._name)  # type: ignore[no-any-return]


class HeadSwap:
    """The all-to-all between my tokens of all heads and all tokens of my heads, several tensors in one message."""

    def __init__(self, communicator: Communicator, layout: ChunkLayout) -> None:
        self._communicator, self._layout = communicator, layout
        self.world = communicator.size

    def to_heads(self, *tensors: tuple[Tensor, int]) -> list[Tensor]:
        """Of each (x, copies): [B, n, H, D], every head `copies` times -> [B, N, copies H / W, D], tokens in order."""
        repeated = [x.repeat_interleave(copies, 2) if copies > 1 else x for x, copies in tensors]
        by_rank = [x.unflatten(2, (self.world, -1)).movedim(2, 0) for x in repeated]
        parts = self._communicator.all_to_all(torch.cat(by_rank, 3))
        return [joined(part, 1, self._layout) for part in parts.split([x.shape[3] for x in by_rank], 3)]

    def to_tokens(self, *tensors: tuple[Tensor, int]) -> list[Tensor]:
        """Of each (x, copies): [B, N, h, D] -> [B, n, W h / copies, D], copies of a head summed in float32 at least."""
        by_rank = torch.cat([x for x, _ in tensors], 2) if len(tensors) > 1 else tensors[0][0]
        parts = self._communicator.all_to_all(parted(by_rank, 1, self._layout))
        outs = []
        for (_, copies), part in zip(tensors, parts.split([x.shape[2] for x, _ in tensors], 3), strict=True):
            out = part.movedim(0, 2).flatten(2, 3)
            if copies > 1:
                dtype = torch.promote_types(out.dtype, torch.float32)
                out = out.unflatten(2, (-1, copies)).sum(3, dtype=dtype).to(out.dtype)
            outs.append(out.clone(memory_format=torch.contiguous_format))  # ops return tensors of their own
        return outs


# Opaque to torch.compile, like `lhcp::attend`. One op, and one gradient, for q, k and v together: a rank that needs
# fewer gradients than another must still take part in all of its transfers.

_TAGS = (torch.Tag.pt2_compliant_tag,)
for _name in ("share_heads", "share_heads_backward"):
    torch.library.define(
        f"lhcp::{_name}", "(Tensor q, Tensor k, Tensor v, int copies, str swap) -> (Tensor, Tensor, Tensor)", tags=_TAGS
    )
for _name in ("unite_heads", "unite_heads_backward"):
    torch.library.define(f"lhcp::{_name}", "(Tensor x, str swap) -> Tensor", tags=_TAGS)

Triple = tuple[Tensor, Tensor, Tensor]


@torch.library.impl("lhcp::share_heads", "default")
def _share(q: Tensor, k: Tensor, v: Tensor, copies: int, swap: str) -> Triple:
    q, k, v = named(swap, HeadSwap).to_heads((q, 1), (k, copies), (v, copies))
    return q, k, v


@torch.library.impl("lhcp::share_heads_backward", "default")
def _share_backward(dq: Tensor, dk: Tensor, dv: Tensor, copies: int, swap: str) -> Triple:
    dq, dk, dv = named(swap, HeadSwap).to_tokens((dq, 1), (dk, copies), (dv, copies))
    return dq, dk, dv


@torch.library.impl("lhcp::unite_heads", "default")
def _unite(x: Tensor, swap: str) -> Tensor:
    return named(swap, HeadSwap).to_tokens((x, 1))[0]


@torch.library.impl("lhcp::unite_heads_backward", "default")
def _unite_backward(grad: Tensor, swap: str) -> Tensor:
    return named(swap, HeadSwap).to_heads((grad, 1))[0]


def _with_my_heads(x: Tensor, copies: int, swap: str) -> Tensor:
    world = named(swap, HeadSwap).world
    return x.new_empty(x.shape[0], x.shape[1] * world, x.shape[2] * copies // world, x.shape[3])


def _with_my_tokens(x: Tensor, copies: int, swap: str) -> Tensor:
    world = named(swap, HeadSwap).world
    return x.new_empty(x.shape[0], x.shape[1] // world, x.shape[2] * world // copies, x.shape[3])


def _share_shapes(q: Tensor, k: Tensor, v: Tensor, copies: int, swap: str) -> Triple:
    return _with_my_heads(q, 1, swap), _with_my_heads(k, copies, swap), _with_my_heads(v, copies, swap)


def _share_backward_shapes(dq: Tensor, dk: Tensor, dv: Tensor, copies: int, swap: str) -> Triple:
    return _with_my_tokens(dq, 1, swap), _with_my_tokens(dk, copies, swap), _with_my_tokens(dv, copies, swap)


def _unite_shape(x: Tensor, swap: str) -> Tensor:
    return _with_my_tokens(x, 1, swap)


def _unite_backward_shape(grad: Tensor, swap: str) -> Tensor:
    return _with_my_heads(grad, 1, swap)


def _keep_both(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, str], output: Triple) -> None:
    ctx.copies = inputs[3]
    _keep(ctx, inputs, output)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.swap = inputs[-1]
    ctx.alive = named(ctx.swap, HeadSwap)  # until backward, also where nobody else keeps it


def _share_gradients(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    return *torch.ops.lhcp.share_heads_backward(dq, dk, dv, ctx.copies, ctx.swap), None, None


def _unite_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.lhcp.unite_heads_backward(grad, ctx.swap), None


torch.library.register_fake("lhcp::share_heads", _share_shapes)
torch.library.register_fake("lhcp::share_heads_backward", _share_backward_shapes)
torch.library.register_fake("lhcp::unite_heads", _unite_shape)
torch.library.register_fake("lhcp::unite_heads_backward", _unite_backward_shape)
torch.library.register_autograd("lhcp::share_heads", _share_gradients, setup_context=_keep_both)
torch.library.register_autograd("lhcp::unite_heads", _unite_gradient, setup_context=_keep)
