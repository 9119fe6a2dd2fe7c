"""The ring's order of events, its buffers, and its refusal of misuse."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.emulation import Alone, stand_in
from lhcp.config import Sharding
from lhcp.distributed.communicator import GroupCommunicator
from lhcp.distributed.exchange import ring as ring_module
from lhcp.distributed.exchange.block import CpuBackend
from lhcp.distributed.exchange.ring import RingExchange
from lhcp.distributed.link import Link, Transfer
from lhcp.distributed.sharding import ChunkLayout
from ranks import run_ranks

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 24, 4, 2, 6


class Recorder(GroupCommunicator):
    """Real links and a real block backend that note what happens, in order."""

    def __init__(self) -> None:
        super().__init__(dist.group.WORLD)
        self.events: list[str] = []

    def link(self) -> Link:
        recorder, link = self, super().link()

        class RecordingLink(Link):
            def post(self, *transfers: Transfer) -> None:
                # Keys and values go on, their gradients back, in two tensors each.
                steps = [transfer.places for transfer in transfers[::2]]
                assert steps == [transfer.places for transfer in transfers[1::2]]
                recorder.events.append("post " + " ".join(f"{'kv' if p > 0 else 'dkv'}{abs(p)}" for p in steps))
                super().post(*transfers)

            def wait(self) -> None:
                super().wait()
                recorder.events.append("wait")

        return RecordingLink(link._start)

    def backend(self) -> CpuBackend:
        recorder = self

        class RecordingBackend(CpuBackend):
            def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
                recorder.events.append("diagonal" if causal else "block")
                return super().forward(q, k, v, causal)

            def backward(
                self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
            ) -> tuple[Tensor, Tensor, Tensor]:
                recorder.events.append("diagonal" if causal else "block")
                return super().backward(grad, q, k, v, out, lse, causal)

        return RecordingBackend()


def record(
    world: int, sharding: Sharding, monkeypatch: pytest.MonkeyPatch, kv_heads: int = KV_HEADS
) -> list[tuple[list[str], list[str]]]:
    """Events of forward and of backward, by rank."""

    def rank_main(rank: int) -> tuple[list[str], list[str]]:
        q = torch.randn(BATCH, LENGTH, HEADS, WIDTH, dtype=torch.bfloat16)
        k, v = (torch.randn(BATCH, LENGTH, kv_heads, WIDTH, dtype=torch.bfloat16) for _ in range(2))
        results = []
        saved: tuple[Tensor, ...] = ()
        for direction in ("forward", "backward"):
            recorder = Recorder()
            backend = recorder.backend()
            monkeypatch.setattr(ring_module, "block_backend", lambda name, q, backend=backend: backend)
            exchange = RingExchange(recorder, ChunkLayout(world, sharding), "cpu")
            if direction == "forward":
                saved = exchange.forward(q, k, v)
            else:
                exchange.backward(torch.randn_like(q), q, k, v, *saved)
            results.append(recorder.events)
        return results[0], results[1]

    return run_ranks(world, rank_main)


def blocks(rank: int, *steps: int) -> list[str]:
    """Of some steps under zigzag: earlier ranks' keys are one, for all queries; later ranks' another."""
    return ["block"] * len({step <= rank for step in steps})


def test_forward_posts_before_and_waits_after_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, (events, _) in enumerate(record(6, "zigzag", monkeypatch)):
        assert events == [
            "post kv1", "diagonal", "wait",
            "post kv2 kv3", "block", "wait",
            "post kv4 kv5", *blocks(rank, 2, 3), "wait",
            *blocks(rank, 4, 5),
        ]  # fmt: skip


def test_backward_overlaps_every_transfer_with_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients go back beside the next blocks; the diagonal of half the heads comes last, beside the last of them."""
    for rank, (_, events) in enumerate(record(6, "zigzag", monkeypatch)):
        assert events == [
            "post kv1", "diagonal", "wait",
            "post kv2 kv3", "block", "wait",
            "post kv4 kv5 dkv1", *blocks(rank, 2, 3), "wait",
            "post dkv2 dkv3", *blocks(rank, 4, 5), "wait",
            "post dkv4 dkv5", "diagonal", "wait",
        ]  # fmt: skip


def test_one_head_of_keys_is_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    for _, events in record(2, "zigzag", monkeypatch, kv_heads=1):
        assert events == ["post kv1", "diagonal", "wait", "block", "post dkv1", "wait"]


class Alive(TorchDispatchMode):
    """The most bytes that tensors of 2 or 4 heads held at once, those of `without` apart."""

    def __init__(self, *without: Tensor) -> None:
        super().__init__()
        self._without = {x.data_ptr() for x in without}
        self._tensors: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.dim() > 3 and {2, 4} & {*x.shape[-3:-1]}]
        self._tensors += [weakref.ref(x) for x in found]
        storages = [x.untyped_storage() for x in (ref() for ref in self._tensors) if x is not None]
        alive = {storage.data_ptr(): storage.nbytes() for storage in storages}
        self.most = max(self.most, sum(size for at, size in alive.items() if at not in self._without))
        return out


@pytest.mark.parametrize("sharding", ["zigzag", "contiguous"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("world", [2, 4, 8, 32])
def test_few_buffers_are_held(world: int, batch: int, sharding: Sharding) -> None:
    """Those of docs/context-parallel.md, by ranks without each other."""
    forward, backward = [], []
    for rank in range(world):
        exchange = RingExchange(Alone(rank, world, torch.device("cpu")), ChunkLayout(world, sharding), "cpu")
        q, grad = (torch.randn(batch, 64, 12, WIDTH, dtype=torch.bfloat16) for _ in range(2))
        k, v = (torch.randn(batch, 64, 4, WIDTH, dtype=torch.bfloat16) for _ in range(2))
        with Alive(k, v) as alive:
            out, lse = exchange.forward(q, k, v)
        forward.append(alive.most)
        with Alive(k, v) as alive:
            exchange.backward(grad, q, k, v, out, lse)
        backward.append(alive.most)
    kv = k.nbytes + v.nbytes
    most = {
        1: {2: (1, 4.5), 4: (3, 7), 8: (4, 10), 32: (4, 13 + 2)},
        2: {2: (1.5, 4.5), 4: (5, 8), 8: (7, 13), 32: (7, 15 + 2)},
    }[batch][world]
    found = max(forward) / kv, max(backward) / kv
    assert found == most if sharding == "zigzag" else all(x <= y for x, y in zip(found, most, strict=True))


class Late(Alone):
    """Buffers hold no number from when they are posted until they are waited for, when they hold what came."""

    def link(self) -> Link:
        def start(transfers: Sequence[Transfer]) -> Callable[[], None]:
            sent = [None if x.send is None else x.send.clone() for x in transfers]
            for x in transfers:
                if x.receive is not None:
                    x.receive.fill_(math.nan)

            def finish() -> None:
                for x, before in zip(transfers, sent, strict=True):
                    assert before is None or (x.send is not None and torch.equal(x.send, before))
                    stand_in(x)

            return finish

        return Link(start)


@pytest.mark.parametrize("sharding", ["zigzag", "contiguous"])
@pytest.mark.parametrize("world", [2, 3, 8, 16])
def test_buffers_are_left_alone_until_they_are_waited_for(world: int, sharding: Sharding) -> None:
    for rank in range(world):
        layout, tensors = ChunkLayout(world, sharding), [torch.randn(2, 8, 2, WIDTH) for _ in range(4)]
        results = []
        for ranks in (Late(rank, world, torch.device("cpu")), Alone(rank, world, torch.device("cpu"))):
            exchange = RingExchange(ranks, layout, "cpu")
            out, lse = exchange.forward(*tensors[:3])
            results.append((out, lse, *exchange.backward(tensors[3], *tensors[:3], out, lse)))
        for late, at_once in zip(*results, strict=True):
            torch.testing.assert_close(late, at_once, rtol=0, atol=0)


def test_contiguous_ranks_compute_only_what_they_see(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, directions in enumerate(record(4, "contiguous", monkeypatch)):
        for events in directions:
            assert events.count("block") == (1 + rank // 2 if rank else 0)  # {1}, {2, 3}


def test_misuse_of_a_link_is_refused() -> None:
    def rank_main(rank: int) -> None:
        link = GroupCommunicator(dist.group.WORLD).link()
        with pytest.raises(RuntimeError, match="call post first"):
            link.wait()
        with pytest.raises(RuntimeError, match="contiguous"):
            link.post(Transfer(1, torch.zeros(4, 4).T, None))
        with pytest.raises(RuntimeError, match="contiguous"):
            link.post(Transfer(1, None, torch.zeros(4, 4).T))
        with pytest.raises(RuntimeError, match="one dtype"):
            link.post(Transfer(1, torch.zeros(4), torch.zeros(4).double()))
        same = torch.zeros(4)
        with pytest.raises(RuntimeError, match="one buffer"):
            link.post(Transfer(1, same, same))
        link.post(Transfer(1, None, None))
        with pytest.raises(RuntimeError, match="under way"):
            link.post(Transfer(1, None, None))
        link.wait()

    run_ranks(2, rank_main)


def test_transfers_go_where_they_are_told() -> None:
    """On, further, back, and from one rank alone, all at once."""

    def rank_main(rank: int) -> None:
        link = GroupCommunicator(dist.group.WORLD).link()
        on, further, back = (torch.full((size,), -1) for size in (4, 2, 3))
        first = torch.full((5,), -1)
        link.post(
            Transfer(1, torch.full((4,), rank), on),
            Transfer(2, torch.full((2,), rank + 10), further),
            Transfer(-1, torch.full((3,), rank + 20), back),
            Transfer(1, torch.full((5,), 7) if rank == 0 else None, first if rank == 1 else None),
        )
        link.wait()
        assert on.tolist() == [(rank - 1) % 4] * 4
        assert further.tolist() == [(rank - 2) % 4 + 10] * 2
        assert back.tolist() == [(rank + 1) % 4 + 20] * 3
        assert first.tolist() == [7 if rank == 1 else -1] * 5

    run_ranks(4, rank_main)
