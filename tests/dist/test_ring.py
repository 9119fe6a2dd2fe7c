"""The ring's order of events, its bytes, and its refusal of misuse."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from lhcp.distributed.exchange.p2p import RingLink
from torch import Tensor
from torch.distributed import ProcessGroup

from lhcp.config import Sharding
from lhcp.distributed.exchange import ring as ring_module
from lhcp.distributed.exchange.block import CpuBackend
from lhcp.distributed.exchange.ring import RingExchange
from lhcp.distributed.sharding import ChunkLayout
from ranks import run_ranks

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 8, 4, 2, 6


class Recorder:
    """A real link and a real block backend that note what happens, in order, and the bytes that leave."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.bytes_sent = 0
        self.links = 0

    def link(self, group: ProcessGroup) -> RingLink:
        recorder, name = self, f"link{self.links}"
        self.links += 1

        class RecordingLink(RingLink):
            def post(self, send: Tensor, receive: Tensor) -> None:
                recorder.events.append(f"{name} post")
                recorder.bytes_sent += send.nbytes
                super().post(send, receive)

            def wait(self) -> None:
                super().wait()
                recorder.events.append(f"{name} wait")

        return RecordingLink(group)

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
    world: int, sharding: Sharding, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.bfloat16
) -> list[tuple[tuple[list[str], int], tuple[list[str], int]]]:
    """(events, bytes sent) of forward and of backward, by rank."""

    def rank_main(rank: int) -> tuple[tuple[list[str], int], tuple[list[str], int]]:
        forward, backward = Recorder(), Recorder()
        q = torch.randn(BATCH, LENGTH, HEADS, WIDTH, dtype=dtype)
        k, v = (torch.randn(BATCH, LENGTH, KV_HEADS, WIDTH, dtype=dtype) for _ in range(2))
        results = []
        saved: tuple[Tensor, ...] = ()
        for recorder in (forward, backward):
            backend = recorder.backend()
            monkeypatch.setattr(ring_module, "block_backend", lambda name, q, backend=backend: backend)
            exchange = RingExchange(dist.group.WORLD, ChunkLayout(world, sharding), rank, "cpu", recorder.link)
            if recorder is forward:
                saved = exchange.forward(q, k, v)
            else:
                exchange.backward(torch.randn_like(q), q, k, v, *saved)
            results.append((recorder.events, recorder.bytes_sent))
        return results[0], results[1]

    return run_ranks(world, rank_main)


def test_forward_posts_before_and_waits_after_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    for (events, _), _ in record(4, "zigzag", monkeypatch):
        assert events == [
            "link0 post", "diagonal", "link0 wait",
            "link0 post", "block", "link0 wait",
            "link0 post", "block", "link0 wait",
            "block",
        ]  # fmt: skip


def test_backward_overlaps_both_transfers_with_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """link0 carries keys and values, link1 their gradients, one hop behind."""
    for _, (events, _) in record(4, "zigzag", monkeypatch):
        assert events == [
            "link0 post", "diagonal", "link0 wait",
            "link0 post", "block", "link1 post", "link0 wait",
            "link0 post", "block", "link1 wait", "link1 post", "link0 wait",
            "block", "link1 wait", "link1 post",
            "link1 wait",
        ]  # fmt: skip


def test_contiguous_ranks_compute_only_what_they_see(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, ((events, _), _) in enumerate(record(4, "contiguous", monkeypatch)):
        assert events.count("block") == rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("world", [2, 4])
def test_bytes_sent(world: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward (W - 1) x (k and v); backward the same and (W - 1) x their gradients, at least float32."""
    rows = 2 * BATCH * LENGTH * KV_HEADS * WIDTH
    kv, gradients = rows * dtype.itemsize, rows * max(4, dtype.itemsize)
    for (_, forward), (_, backward) in record(world, "zigzag", monkeypatch, dtype):
        assert forward == (world - 1) * kv
        assert backward == (world - 1) * (kv + gradients)


def test_misuse_of_a_link_is_refused() -> None:
    def rank_main(rank: int) -> None:
        link = RingLink(dist.group.WORLD)
        with pytest.raises(RuntimeError, match="call post first"):
            link.wait()
        with pytest.raises(RuntimeError, match="contiguous"):
            link.post(torch.zeros(4, 4).T, torch.zeros(4, 4))
        with pytest.raises(RuntimeError, match="shards of one shape"):
            link.post(torch.zeros(4), torch.zeros(5))
        same = torch.zeros(4)
        with pytest.raises(RuntimeError, match="one buffer"):
            link.post(same, same)
        received = torch.full((4,), -1.0)
        link.post(torch.full((4,), float(rank)), received)
        with pytest.raises(RuntimeError, match="under way"):
            link.post(torch.zeros(4), torch.zeros(4))
        link.wait()
        assert received.tolist() == [(rank - 1) % 3] * 4

    run_ranks(3, rank_main)
