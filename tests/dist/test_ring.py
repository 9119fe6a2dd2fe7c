"""The ring's order of events, its buffers, and its refusal of misuse."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lhcp.config import Sharding
from lhcp.distributed.communicator import GroupCommunicator
from lhcp.distributed.exchange import ring as ring_module
from lhcp.distributed.exchange.block import CpuBackend
from lhcp.distributed.exchange.ring import RingExchange
from lhcp.distributed.link import RingLink, Transfer
from lhcp.distributed.sharding import ChunkLayout
from ranks import run_ranks

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 8, 4, 2, 6


class Recorder(GroupCommunicator):
    """Real links and a real block backend that note what happens, in order, and which buffers are sent."""

    def __init__(self) -> None:
        super().__init__(dist.group.WORLD)
        self.events: list[str] = []
        self.buffers: set[tuple[torch.dtype, int]] = set()

    def link(self) -> RingLink:
        recorder, link = self, super().link()

        class RecordingLink(RingLink):
            def post(self, *transfers: Transfer) -> None:
                # Keys and values are sent in their own dtype, gradients in float32.
                recorder.events.append(
                    "post " + " ".join("kv" if send.dtype == torch.bfloat16 else "dkv" for send, _ in transfers)
                )
                recorder.buffers |= {(x.dtype, x.data_ptr()) for transfer in transfers for x in transfer}
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


Recorded = tuple[list[str], Counter[torch.dtype]]
"""Events, and how many buffers were sent or received into, by dtype."""


def record(
    world: int, sharding: Sharding, monkeypatch: pytest.MonkeyPatch, kv_heads: int = KV_HEADS
) -> list[tuple[Recorded, Recorded]]:
    """Of forward and of backward, by rank."""

    def rank_main(rank: int) -> tuple[Recorded, Recorded]:
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
            results.append((recorder.events, Counter(dtype for dtype, _ in recorder.buffers)))
        return results[0], results[1]

    return run_ranks(world, rank_main)


def test_forward_posts_before_and_waits_after_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    for (events, _), _ in record(4, "zigzag", monkeypatch):
        assert events == [
            "post kv", "diagonal", "wait",
            "post kv", "block", "wait",
            "post kv", "block", "wait",
            "block",
        ]  # fmt: skip


def test_backward_overlaps_every_transfer_with_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients travel one hop behind; the diagonal block of half the heads comes last, beside their last hop."""
    for _, (events, _) in record(4, "zigzag", monkeypatch):
        assert events == [
            "post kv", "diagonal", "wait",
            "post kv", "block", "wait",
            "post kv dkv", "block", "wait",
            "post dkv", "block", "wait",
            "post dkv", "diagonal", "wait",
        ]  # fmt: skip


def test_one_head_of_keys_is_not_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    for _, (events, _) in record(2, "zigzag", monkeypatch, kv_heads=1):
        assert events == ["post kv", "diagonal", "wait", "block", "post dkv", "wait"]


def test_two_buffers_travel_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for (_, forward), (_, backward) in record(4, "zigzag", monkeypatch):
        assert forward == {torch.bfloat16: 2}
        assert backward == {torch.bfloat16: 2, torch.float32: 2}


def test_contiguous_ranks_compute_only_what_they_see(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, ((events, _), _) in enumerate(record(4, "contiguous", monkeypatch)):
        assert events.count("block") == rank


def test_misuse_of_a_link_is_refused() -> None:
    def rank_main(rank: int) -> None:
        link = GroupCommunicator(dist.group.WORLD).link()
        with pytest.raises(RuntimeError, match="call post first"):
            link.wait()
        with pytest.raises(RuntimeError, match="contiguous"):
            link.post((torch.zeros(4, 4).T, torch.zeros(4, 4)))
        with pytest.raises(RuntimeError, match="shards of one shape"):
            link.post((torch.zeros(4), torch.zeros(5)))
        same = torch.zeros(4)
        with pytest.raises(RuntimeError, match="one buffer"):
            link.post((same, same))
        received, also = torch.full((4,), -1.0), torch.full((2,), -1)
        link.post((torch.full((4,), float(rank)), received), (torch.full((2,), rank + 10), also))
        with pytest.raises(RuntimeError, match="under way"):
            link.post((torch.zeros(4), torch.zeros(4)))
        link.wait()
        assert received.tolist() == [(rank - 1) % 3] * 4
        assert also.tolist() == [(rank - 1) % 3 + 10] * 2

    run_ranks(3, rank_main)
