"""Ulysses: attention of whole sequences, a share of the heads on each rank (Jacobs et al., arXiv:2309.14509).

An all-to-all turns [B, n, H, D] (my tokens, all heads) into [B, N, H / W, D] (all tokens, my heads), and another turns
the output back. Each is a torch op whose gradient is the other; between them is the attention of one rank.
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
        q = torch.ops.lhcp.tokens_to_heads(q, 1, self._name)
        k, v = (torch.ops.lhcp.tokens_to_heads(x, copies, self._name) for x in (k, v))
        out: Tensor = torch.ops.lhcp.heads_to_tokens(self._local(q, k, v), 1, self._name)
        return out


class HeadSwap:
    """The two all-to-alls."""

    def __init__(self, communicator: Communicator, layout: ChunkLayout) -> None:
        self._communicator, self._layout = communicator, layout
        self.world = communicator.size

    def to_heads(self, x: Tensor, copies: int) -> Tensor:
        """[B, n, H, D], every head `copies` times -> [B, N, copies H / W, D], tokens in the order of the sequence."""
        by_rank = x.repeat_interleave(copies, 2) if copies > 1 else x
        parts = self._communicator.all_to_all(by_rank.unflatten(2, (self.world, -1)).movedim(2, 0))
        return joined(parts, 1, self._layout).contiguous()

    def to_tokens(self, x: Tensor, copies: int) -> Tensor:
        """[B, N, h, D] -> [B, n, W h / copies, D], copies of a head summed in the accumulation dtype."""
        parts = self._communicator.all_to_all(parted(x, 1, self._layout))
        out = parts.movedim(0, 2).flatten(2, 3)
        if copies > 1:
            out = out.unflatten(2, (-1, copies)).sum(3, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)
        return out.contiguous()


# Opaque to torch.compile, like `lhcp::attend`.


_SIGNATURE = "(Tensor x, int copies, str swap) -> Tensor"
_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define("lhcp::tokens_to_heads", _SIGNATURE, tags=_TAGS)
torch.library.define("lhcp::heads_to_tokens", _SIGNATURE, tags=_TAGS)


@torch.library.impl("lhcp::tokens_to_heads", "default")
def _to_heads(x: Tensor, copies: int, swap: str) -> Tensor:
    return named(swap, HeadSwap).to_heads(x, copies)


@torch.library.impl("lhcp::heads_to_tokens", "default")
def _to_tokens(x: Tensor, copies: int, swap: str) -> Tensor:
    return named(swap, HeadSwap).to_tokens(x, copies)


def _to_heads_shape(x: Tensor, copies: int, swap: str) -> Tensor:
    world = named(swap, HeadSwap).world
    return x.new_empty(x.shape[0], x.shape[1] * world, x.shape[2] * copies // world, x.shape[3])


def _to_tokens_shape(x: Tensor, copies: int, swap: str) -> Tensor:
    world = named(swap, HeadSwap).world
    return x.new_empty(x.shape[0], x.shape[1] // world, x.shape[2] * world // copies, x.shape[3])


def _keep(ctx: Any, inputs: tuple[Tensor, int, str], output: Tensor) -> None:
    _, ctx.copies, ctx.swap = inputs
    ctx.alive = named(ctx.swap, HeadSwap)  # until backward, also where nobody else keeps it


def _to_heads_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.lhcp.heads_to_tokens(grad, ctx.copies, ctx.swap), None, None


def _to_tokens_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.lhcp.tokens_to_heads(grad, ctx.copies, ctx.swap), None, None


torch.library.register_fake("lhcp::tokens_to_heads", _to_heads_shape)
torch.library.register_fake("lhcp::heads_to_tokens", _to_tokens_shape)
torch.library.register_autograd("lhcp::tokens_to_heads", _to_heads_gradient, setup_context=_keep)
torch.library.register_autograd("lhcp::heads_to_tokens", _to_tokens_gradient, setup_context=_keep)
