"""Ring attention: keys and values travel round the ranks, overlapped with compute (Liu et al., arXiv:2310.01889).

At step i a rank holds the keys and values of rank r - i. Step 0 is the diagonal block, so every query row has
a finite log-sum-exp before blocks are merged. In backward the keys and values travel again, and with them, one
hop behind, the gradient that the visited ranks have summed for them; a rank's own part never leaves it. Of the
diagonal block half the heads come first, beside the first hop of the keys and values, and half last, beside the
last hop of their gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lhcp.config import BlockBackendName
from lhcp.distributed.communicator import Communicator
from lhcp.distributed.exchange.block import block_backend
from lhcp.distributed.exchange.merge import add, merge
from lhcp.distributed.sharding import ChunkLayout


@dataclass(frozen=True)
class Block:
    """The part of a step that is not masked: these queries against these keys."""

    queries: slice
    keys: slice


def visible_block(layout: ChunkLayout, rank: int, source: int, length: int) -> Block | None:
    """What `rank`'s queries see of the keys of `source`, another rank; each holds `length` tokens.

    Under zigzag, rank r holds chunks r and 2W-1-r: an earlier rank's first chunk lies before both of r's, its
    second after both; a later rank's chunks both lie between r's two.
    """
    assert source != rank
    everything = slice(0, length)
    if layout.chunks_per_rank == 1:
        return Block(everything, everything) if source < rank else None
    if source < rank:
        return Block(everything, slice(0, length // 2))
    return Block(slice(length // 2, length), everything)


class RingExchange:
    """Causal attention over shards by point-to-point rotation of keys and values.

    A rank sends (W - 1) x (k and v) in forward, and in backward the same again plus (W - 1) x their gradients
    in the accumulation dtype. At most two key-value buffers are held.
    """

    def __init__(self, communicator: Communicator, layout: ChunkLayout, backend: BlockBackendName) -> None:
        self._communicator, self._layout, self._backend = communicator, layout, backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `Exchange.forward`."""
        block = block_backend(self._backend, q)
        link, world = self._communicator.link(), self._layout.world
        kv = torch.stack((k, v))
        spare = torch.empty_like(kv)

        link.post((kv, spare))
        first, lse = block.forward(q, k, v, causal=True)
        out = first.to(torch.promote_types(q.dtype, torch.float32))
        link.wait()
        for step in range(1, world):
            kv, spare = spare, kv
            if step < world - 1:
                link.post((kv, spare))
            part = self._part(step, q.shape[1])
            if part is not None:
                rows = part.queries
                new, new_lse = block.forward(q[:, rows], kv[0, :, part.keys], kv[1, :, part.keys], causal=False)
                merge(out[:, rows], lse[..., rows], new, new_lse)
            if step < world - 1:
                link.wait()
        return out.to(q.dtype), lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Exchange.backward`."""
        block = block_backend(self._backend, q)
        link, world, dtype = self._communicator.link(), self._layout.world, torch.promote_types(q.dtype, torch.float32)
        grad = grad.contiguous()
        groups, share = k.shape[2], q.shape[2] // k.shape[2]
        half = max(1, groups // 2)
        kv = torch.stack((k, v))
        spare = torch.empty_like(kv)
        dq = q.new_zeros(q.shape, dtype=dtype)

        def diagonal(some: slice) -> tuple[Tensor, Tensor]:
            """Of some groups of heads: adds to dq; dk and dv."""
            heads = slice(some.start * share, some.stop * share)
            dq_, dk_, dv_ = block.backward(
                grad[:, :, heads], q[:, :, heads], k[:, :, some], v[:, :, some], out[:, :, heads],
                lse[:, heads].contiguous(), causal=True,
            )  # fmt: skip
            add(dq[:, :, heads], dq[:, :, heads], dq_)
            return dk_, dv_

        link.post((kv, spare))
        early, late = slice(0, half), slice(half, groups)
        own = [(early, diagonal(early))]
        link.wait()
        dkv, arriving = (kv.new_empty(kv.shape, dtype=dtype) for _ in range(2))
        for step in range(1, world):
            kv, spare = spare, kv
            transfers = [(kv, spare)] if step < world - 1 else []
            transfers += [(dkv, arriving)] if step > 1 else []
            if transfers:
                link.post(*transfers)
            part = self._part(step, q.shape[1])
            if part is not None:
                rows, keys = part.queries, part.keys
                dq_, dk_, dv_ = block.backward(
                    grad[:, rows], q[:, rows], kv[0, :, keys], kv[1, :, keys], out[:, rows],
                    lse[..., rows].contiguous(), causal=False,
                )  # fmt: skip
                add(dq[:, rows], dq[:, rows], dq_)
            if transfers:
                link.wait()
            if step == 1:  # nothing has arrived
                dkv[:, :, 0 if part is None else keys.stop :] = 0
                if part is not None:
                    dkv[0, :, keys], dkv[1, :, keys] = dk_, dv_
            else:
                dkv, arriving = arriving, dkv
                if part is not None:
                    for sums, new in zip(dkv[:, :, keys], (dk_, dv_), strict=True):
                        add(sums, sums, new)
        link.post((dkv, arriving))
        if half < groups:
            own.append((late, diagonal(late)))
        link.wait()
        dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
        for some, parts in own:
            for whole, mine, arrived in zip((dk, dv), parts, arriving, strict=True):
                add(whole[:, :, some], mine, arrived[:, :, some])
        return dq.to(q.dtype), dk, dv

    def _part(self, step: int, length: int) -> Block | None:
        rank, world = self._communicator.rank, self._layout.world
        return visible_block(self._layout, rank, (rank - step) % world, length)
