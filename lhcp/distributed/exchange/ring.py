"""Ring attention: keys and values go round the ranks, overlapped with compute (Liu et al., arXiv:2310.01889).

At step i a rank has the keys and values of rank r - i. They come straight from it, not from rank to rank, so only what
is visible travels, and their gradient goes straight back to it, which sums in the accumulation dtype what comes. Step 0
is the diagonal block, so every query row has a finite log-sum-exp before blocks are merged. In backward half its heads
come first, beside the first keys and values, and half last, beside the last gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lhcp.config import BlockBackendName
from lhcp.distributed.communicator import Communicator
from lhcp.distributed.exchange.block import block_backend
from lhcp.distributed.exchange.merge import Merge, Sum
from lhcp.distributed.link import Transfer
from lhcp.distributed.sharding import ChunkLayout

Pair = tuple[Tensor, Tensor]
"""Keys and values, or the gradients of both."""


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
    """Causal attention over shards by point-to-point transfers of visible keys and values.

    In forward rank r of W sends (W - 1 + r) / 2 times its k and v under zigzag, W - 1 - r times where contiguous; in
    backward as much again, and gradients of what it was sent, in k's dtype. At most two ranks' keys and values are held
    besides its own, and gradients of five blocks.
    """

    def __init__(self, communicator: Communicator, layout: ChunkLayout, backend: BlockBackendName) -> None:
        self._communicator, self._layout, self._backend = communicator, layout, backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `Exchange.forward`."""
        block = block_backend(self._backend, q)
        link, world = self._communicator.link(), self._layout.world
        k, v = k.contiguous(), v.contiguous()

        coming, transfers = self._keys(1, (k, v))
        link.post(*transfers)
        merge = Merge(q)
        merge.add(*block.forward(q, k, v, causal=True))
        link.wait()
        for step in range(1, world):
            kv = coming
            if step < world - 1:
                coming, transfers = self._keys(step + 1, (k, v))
                link.post(*transfers)
            if kv is not None:
                rows = self._rows(step, q)
                merge.add(*block.forward(q[:, rows], kv[0], kv[1], causal=False), rows)
            if step < world - 1:
                link.wait()
        return merge.result()

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Exchange.backward`."""
        block = block_backend(self._backend, q)
        link, world = self._communicator.link(), self._layout.world
        grad, k, v = grad.contiguous(), k.contiguous(), v.contiguous()
        groups, share = k.shape[2], q.shape[2] // k.shape[2]
        half = max(1, groups // 2)
        dq, dk, dv = Sum(q), Sum(k), Sum(v)

        def diagonal(some: slice) -> None:
            """Of some groups of heads."""
            heads = slice(some.start * share, some.stop * share)
            gradients = block.backward(
                grad[:, :, heads], q[:, :, heads], k[:, :, some], v[:, :, some], out[:, :, heads],
                lse[:, heads].contiguous(), causal=True,
            )  # fmt: skip
            for total, x, place in zip((dq, dk, dv), gradients, (heads, some, some), strict=True):
                total.add(x, heads=place)

        def step_back(rows: slice, kv: Pair) -> Pair:
            """Of these queries and another rank's keys and values, whose gradients are returned."""
            dq_, dk_, dv_ = block.backward(
                grad[:, rows], q[:, rows], kv[0], kv[1], out[:, rows], lse[..., rows].contiguous(), causal=False
            )
            dq.add(dq_, rows)
            return dk_.contiguous(), dv_.contiguous()  # as they are sent

        def arrived(step: int, gradients: Pair | None) -> None:
            """Of what was sent for a step."""
            if gradients is not None:
                seen = self._seen(step, k.shape[1])
                assert seen is not None
                for total, x in zip((dk, dv), gradients, strict=True):
                    total.add(x, seen.keys)

        coming, transfers = self._keys(1, (k, v))
        link.post(*transfers)
        diagonal(slice(0, half))
        link.wait()
        returning: Pair | None = None
        found: Pair | None = None  # gradients of the keys and values of the last step
        for step in range(1, world):
            kv, coming, transfers = coming, None, []
            if step < world - 1:
                coming, transfers = self._keys(step + 1, (k, v))
            if step > 1:
                returning = self._gradients(step - 1, found, (k, v), transfers)
            if transfers:
                link.post(*transfers)
            found = None
            if kv is not None:
                found = step_back(self._rows(step, q), kv)
            if transfers:
                link.wait()
            if step > 1:
                arrived(step - 1, returning)
            kv = returning = None
        transfers = []
        returning = self._gradients(world - 1, found, (k, v), transfers)
        link.post(*transfers)
        if half < groups:
            diagonal(slice(half, groups))
        link.wait()
        arrived(world - 1, returning)
        return dq.result(), dk.result(), dv.result()

    def _keys(self, step: int, kv: Pair) -> tuple[Pair | None, list[Transfer]]:
        """Where the keys and values of a step come, and the transfers that bring them."""
        coming = _buffers(self._received(step, kv))
        return coming, _transfers(step, self._sent(step, kv), coming)

    def _gradients(self, step: int, found: Pair | None, like: Pair, transfers: list[Transfer]) -> Pair | None:
        """Where the gradients of the keys and values that were sent for a step come. To `transfers` is added what
        brings them, and takes away those that this rank has `found`."""
        coming = _buffers(self._sent(step, like))
        transfers += _transfers(-step, found, coming)
        return coming

    def _rows(self, step: int, q: Tensor) -> slice:
        """The queries that see something at a step."""
        block = self._block(self._communicator.rank, step, q.shape[1])
        assert block is not None
        return block.queries

    def _received(self, step: int, kv: Pair) -> Pair | None:
        """What this rank sees of the keys and values `step` places back, in tensors like its own."""
        return _visible(self._block(self._communicator.rank, step, kv[0].shape[1]), kv)

    def _sent(self, step: int, kv: Pair) -> Pair | None:
        """What the rank `step` places on sees of this rank's."""
        return _visible(self._seen(step, kv[0].shape[1]), kv)

    def _seen(self, step: int, length: int) -> Block | None:
        return self._block(self._communicator.rank + step, step, length)

    def _block(self, rank: int, step: int, length: int) -> Block | None:
        return visible_block(self._layout, rank % self._layout.world, (rank - step) % self._layout.world, length)


def _visible(block: Block | None, kv: Pair) -> Pair | None:
    return None if block is None else (kv[0][:, block.keys], kv[1][:, block.keys])


def _buffers(like: Pair | None) -> Pair | None:
    return None if like is None else (like[0].new_empty(like[0].shape), like[1].new_empty(like[1].shape))


def _transfers(places: int, send: Pair | None, receive: Pair | None) -> list[Transfer]:
    pairs = zip(send or (None, None), receive or (None, None), strict=True)
    return [Transfer(places, None if x is None else x.contiguous(), y) for x, y in pairs]
