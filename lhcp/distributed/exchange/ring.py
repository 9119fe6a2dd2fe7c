"""Ring attention: every rank's keys and values come to the others beside compute (Liu et al., arXiv:2310.01889).

At step i a rank has the keys and values of rank r - i. They come straight from it, not from rank to rank, so only what
is visible travels, and their gradient goes straight back to it, which sums in the accumulation dtype what comes. Step 0
is the diagonal block, so every query row has a finite log-sum-exp before blocks are merged. In backward half its heads
come first, beside the first keys and values, and half last, beside the last gradients. Between, steps are taken
`TOGETHER`: a GPU, and its host, do fewer and larger blocks in less time.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lhcp.config import BlockBackendName
from lhcp.distributed.communicator import Communicator
from lhcp.distributed.exchange.block import block_backend
from lhcp.distributed.exchange.merge import Merge, Sum
from lhcp.distributed.link import Transfer
from lhcp.distributed.sharding import ChunkLayout

TOGETHER = 2
"""How many steps are taken at once. But for the first, which has least compute beside what it brings."""

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


@dataclass(frozen=True)
class Received:
    """Keys and values that the same queries see, of m tokens of each of some ranks.

    Attributes:
        steps: at which they are seen.
        queries: that see them.
        k: [len(steps), B, m, G, D].
        v: likewise.
    """

    steps: Sequence[int]
    queries: slice
    k: Tensor
    v: Tensor


class RingExchange:
    """Causal attention over shards by point-to-point transfers of visible keys and values.

    In forward rank r of W sends (W - 1 + r) / 2 times its k and v under zigzag, W - 1 - r times where contiguous; in
    backward as much again, and gradients of what it was sent, in k's dtype. At most four ranks' keys and values are
    held besides its own, and in backward nine ranks' gradients; where there are several sequences copies, too, of two
    ranks' keys and values as they are attended to, and of its own as they are sent.
    """

    def __init__(self, communicator: Communicator, layout: ChunkLayout, backend: BlockBackendName) -> None:
        self._communicator, self._layout, self._backend = communicator, layout, backend
        later = range(2, layout.world)
        self._groups = [range(1, 2), *(later[i : i + TOGETHER] for i in range(0, len(later), TOGETHER))]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `Exchange.forward`."""
        block = block_backend(self._backend, q)
        link = self._communicator.link()
        k, v = k.contiguous(), v.contiguous()
        merge = Merge(q)

        def step(of: Received) -> None:
            merge.add(*block.forward(q[:, of.queries], _joined(of.k), _joined(of.v), causal=False), of.queries)

        coming, transfers = self._keys(self._groups[0], (k, v))
        link.post(*transfers)
        merge.add(*block.forward(q, k, v, causal=True))
        link.wait()
        for following in (*self._groups[1:], None):
            here = coming
            if following:
                coming, transfers = self._keys(following, (k, v))
                link.post(*transfers)
            while here:
                step(here.pop(0))
            if following:
                link.wait()
        return merge.result()

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Exchange.backward`."""
        block = block_backend(self._backend, q)
        link = self._communicator.link()
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

        def step_back(of: Received) -> dict[int, Pair]:
            """Gradients of keys and values, by step."""
            rows = of.queries
            dq_, dk_, dv_ = block.backward(
                grad[:, rows], q[:, rows], _joined(of.k), _joined(of.v), out[:, rows], lse[..., rows].contiguous(),
                causal=False,
            )  # fmt: skip
            dq.add(dq_, rows)
            steps = len(of.steps)
            return dict(zip(of.steps, zip(_divided(dk_, steps), _divided(dv_, steps), strict=True), strict=True))

        def arrived(gradients: Mapping[int, Pair]) -> None:
            """Of what was sent, by step."""
            for step, pair in gradients.items():
                seen = self._seen(step, k.shape[1])
                assert seen is not None
                for total, x in zip((dk, dv), pair, strict=True):
                    total.add(x, seen.keys)

        coming, transfers = self._keys(self._groups[0], (k, v))
        link.post(*transfers)
        diagonal(slice(0, half))
        link.wait()
        found: dict[int, Pair] = {}  # gradients of the keys and values of the steps before
        before: Sequence[int] = ()
        for steps, following in itertools.zip_longest(self._groups, self._groups[1:]):
            here, coming, transfers = coming, [], []
            if following:
                coming, transfers = self._keys(following, (k, v))
            returning, sends = self._gradients(before, found, (k, v))
            transfers += sends
            if transfers:
                link.post(*transfers)
            found, before = {}, steps
            while here:
                found |= step_back(here.pop(0))
            if transfers:
                link.wait()
            arrived(returning)
            returning, sends, transfers = {}, [], []  # or they would be held beside the next
        returning, transfers = self._gradients(before, found, (k, v))
        link.post(*transfers)
        if half < groups:
            diagonal(slice(half, groups))
        link.wait()
        arrived(returning)
        return dq.result(), dk.result(), dv.result()

    def _keys(self, steps: Sequence[int], kv: Pair) -> tuple[list[Received], list[Transfer]]:
        """Where the keys and values of some steps come, and the transfers that bring them."""
        coming, length = [], kv[0].shape[1]
        for block, some in itertools.groupby(steps, lambda step: self._block(self._communicator.rank, step, length)):
            if block is not None:
                seen = tuple(some)
                buffers = (x.new_empty(len(seen), *x[:, block.keys].shape) for x in kv)
                coming.append(Received(seen, block.queries, *buffers))
        places = {step: (k, v) for of in coming for step, k, v in zip(of.steps, of.k, of.v, strict=True)}
        return coming, [x for step in steps for x in _transfers(step, self._sent(step, kv), places.get(step))]

    def _gradients(
        self, steps: Sequence[int], found: Mapping[int, Pair], like: Pair
    ) -> tuple[dict[int, Pair], list[Transfer]]:
        """Where the gradients of the keys and values that were sent for some steps come, by step; and the transfers
        that bring them, and take away those that this rank has `found`."""
        sent = {step: self._sent(step, like) for step in steps}
        coming = {
            step: (kv[0].new_empty(kv[0].shape), kv[1].new_empty(kv[1].shape))
            for step, kv in sent.items()
            if kv is not None
        }
        return coming, [x for step in steps for x in _transfers(-step, found.get(step), coming.get(step))]

    def _sent(self, step: int, kv: Pair) -> Pair | None:
        """What the rank `step` places on sees of this rank's."""
        seen = self._seen(step, kv[0].shape[1])
        return None if seen is None else (kv[0][:, seen.keys], kv[1][:, seen.keys])

    def _seen(self, step: int, length: int) -> Block | None:
        return self._block(self._communicator.rank + step, step, length)

    def _block(self, rank: int, step: int, length: int) -> Block | None:
        return visible_block(self._layout, rank % self._layout.world, (rank - step) % self._layout.world, length)


def _joined(x: Tensor) -> Tensor:
    """[steps, B, m, G, D] as [B, steps x m, G, D]; no copy where B is 1."""
    return x.transpose(0, 1).flatten(1, 2)


def _divided(x: Tensor, steps: int) -> Tensor:
    """The reverse of `_joined`, contiguous, as it is sent."""
    by_step: Tensor = x.unflatten(1, (steps, -1))
    return by_step.transpose(0, 1).contiguous()


def _transfers(places: int, send: Pair | None, receive: Pair | None) -> list[Transfer]:
    pairs = zip(send or (None, None), receive or (None, None), strict=True)
    return [Transfer(places, None if x is None else x.contiguous(), y) for x, y in pairs]
