"""What ranks send for a layer, by closed formulas, by what is handed to transfers, and by what leaves their sockets."""

from __future__ import annotations

import itertools
import os
import socket
import struct
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lhcp.attention import LighthouseConfig, lighthouse_attention
from lhcp.config import ExchangeName, Sharding
from lhcp.distributed import ContextParallel
from lhcp.distributed.communicator import GroupCommunicator
from lhcp.distributed.exchange import block as block_module
from lhcp.distributed.link import Link, Transfer
from lhcp.volume import Attention, Bytes, exchange_bytes, layer_bytes
from ranks import run_ranks

NORM = LighthouseConfig(num_levels=3, pooling_factor=3, topk=32, num_strata=16)
CONFIGS = {"dense": None, "norm": NORM, "dilated": NORM.model_copy(update={"scorer": "dilated", "dilation": 3})}
LENGTH, HEADS, WIDTH, BATCH = 288, 8, 4, 2
EXCHANGES: list[ExchangeName] = ["ring", "allgather", "ulysses"]


class Counting(GroupCommunicator):
    """Counts the bytes that each operation must send."""

    sent = 0

    def all_gather(self, x: Tensor) -> Tensor:
        self.sent += (self.size - 1) * x.nbytes
        return super().all_gather(x)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        self.sent += x.nbytes - x[self.rank].nbytes
        return super().reduce_scatter(x)

    def all_to_all(self, x: Tensor) -> Tensor:
        self.sent += x.nbytes - x[self.rank].nbytes
        return super().all_to_all(x)

    def link(self) -> Link:
        link, counting = super().link(), self

        class CountingLink(Link):
            def post(self, *transfers: Transfer) -> None:
                counting.sent += sum(transfer.send.nbytes for transfer in transfers if transfer.send is not None)
                super().post(*transfers)

        return CountingLink(link._start)


def sent(exchange: ExchangeName, sharding: Sharding, kind: str, kv_heads: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of this rank, forward and backward."""
    communicator = Counting(dist.group.WORLD)
    cp = ContextParallel(sharding=sharding, exchange=exchange, communicator=communicator)
    heads = (HEADS, kv_heads, kv_heads)
    leaves = [torch.randn(BATCH, LENGTH // cp.size, h, WIDTH, dtype=dtype, requires_grad=True) for h in heads]
    config = CONFIGS[kind]
    out = cp.attend(*leaves) if config is None else lighthouse_attention(*leaves, config, context_parallel=cp)
    forward = communicator.sent
    out.sum().backward()
    return forward, communicator.sent - forward


@pytest.mark.parametrize("world", [2, 8])
def test_bytes_are_those_of_the_formula(world: int) -> None:
    cases = [
        (exchange, sharding, kind, kv_heads, dtype)
        for exchange in EXCHANGES
        for sharding in ("zigzag", "contiguous")
        for kind in CONFIGS
        for kv_heads in (8, 2)
        for dtype in (torch.bfloat16, torch.float64)
    ]
    by_rank = run_ranks(world, lambda rank: [sent(*case) for case in cases])
    for number, (exchange, sharding, kind, kv_heads, dtype) in enumerate(cases):
        chunks = 2 if sharding == "zigzag" else 1
        of = Attention(HEADS, kv_heads, WIDTH, dtype.itemsize, BATCH)
        formula = layer_bytes(exchange, CONFIGS[kind], world, chunks, LENGTH, of)
        forward, backward = zip(*(counts[number] for counts in by_rank), strict=True)
        case = (exchange, sharding, kind, kv_heads, dtype)
        assert max(forward) == formula.forward, case
        assert exchange == "ring" or min(forward) == formula.forward, case
        assert set(backward) == {formula.backward}, case


def visible_to_others(rank: int, world: int, sharding: Sharding) -> float:
    """How many times its keys and values the others see of a rank's: chunks, by their order in the sequence."""
    chunks = [(r, 2 * world - 1 - r) if sharding == "zigzag" else (r,) for r in range(world)]
    seen = [
        (mine, other)
        for other in range(world)
        for mine in chunks[rank]
        if other != rank and any(mine < theirs for theirs in chunks[other])
    ]
    return len(seen) / len(chunks[rank])


@pytest.mark.parametrize("sharding", ["zigzag", "contiguous"])
def test_the_ring_sends_what_is_visible(sharding: Sharding) -> None:
    """Of each rank; and back the gradients of what it has seen."""
    world, of = 4, Attention(HEADS, 2, WIDTH, 2, BATCH)
    kv = BATCH * LENGTH // world * 2 * 2 * WIDTH * 2
    counts = run_ranks(world, lambda rank: sent("ring", sharding, "dense", 2, torch.bfloat16))
    for rank, (forward, backward) in enumerate(counts):
        assert forward == kv * visible_to_others(rank, world, sharding)
        if sharding == "zigzag":
            assert forward == kv * (world - 1 + rank) / 2
        else:
            assert forward == kv * (world - 1 - rank)
        assert backward == exchange_bytes("ring", world, 2 if sharding == "zigzag" else 1, LENGTH, of).backward


def socket_bytes() -> int:
    """Bytes that this process has sent over TCP, by its sockets' own count (Linux 4.19), without those sent again."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            copy = socket.socket(fileno=os.dup(int(number)))
        except OSError:  # the listing's own, or no socket
            continue
        with copy:
            if copy.type == socket.SOCK_STREAM and copy.family in (socket.AF_INET, socket.AF_INET6):
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                if len(info) < 216:
                    pytest.skip("this kernel does not count the bytes of a socket")
                all_bytes, again = struct.unpack_from("QQ", info, 200)  # tcpi_bytes_sent, tcpi_bytes_retrans
                total += all_bytes - again
    return total


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_bytes_are_those_of_the_sockets(exchange: ExchangeName) -> None:
    """What gloo really sends, within 1%; but its reduce-scatter is an all-reduce, which sends everything twice."""
    world, length, of = 4, 4096, Attention(4, 4, 32, 4)

    def rank_main(rank: int) -> list[int]:
        cp = ContextParallel(dist.group.WORLD, exchange=exchange)
        leaves = [torch.randn(1, length // world, 4, 32, requires_grad=True) for _ in range(3)]
        counts = []

        def count() -> None:
            dist.barrier()  # all have received, so all is sent
            counts.append(socket_bytes())

        cp.attend(*leaves).sum().backward()  # connections are made at first use
        count()
        out = cp.attend(*leaves)
        count()
        out.sum().backward()
        count()
        return [after - before for before, after in itertools.pairwise(counts)]

    expected = exchange_bytes(exchange, world, 2, length, of)
    if exchange == "allgather":
        gradients = expected.backward - expected.forward
        expected = Bytes(expected.forward, expected.backward + gradients)
    for rank, (forward, backward) in enumerate(run_ranks(world, rank_main)):
        share = (world - 1 + rank) / 2 / (world - 1) if exchange == "ring" else 1  # of what the last rank sends
        assert forward == pytest.approx(share * expected.forward, rel=0.01)
        assert backward == pytest.approx(expected.backward, rel=0.01)


@dataclass
class Work:
    """Query-key pairs of blocks: all, where they are causal one half and the diagonal."""

    pairs: Counter[str]

    def add(self, direction: str, q: Tensor, k: Tensor, causal: bool) -> None:
        n, m = q.shape[1], k.shape[1]
        self.pairs[direction] += q.shape[2] * (n * (n + 1) // 2 if causal else n * m)


def work_by_rank(exchange: ExchangeName, sharding: Sharding, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Pairs of every rank, of 8, as the block kernel is called for them."""

    class CountingBackend(block_module.CpuBackend):
        def __init__(self) -> None:
            self.work = Work(Counter())

        def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
            self.work.add("forward", q, k, causal)
            return super().forward(q, k, v, causal)

        def backward(self, grad: Tensor, q: Tensor, k: Tensor, *others: Tensor, causal: bool) -> block_module.Gradients:
            self.work.add("backward", q, k, causal)
            return super().backward(grad, q, k, *others, causal=causal)

    def rank_main(rank: int) -> Counter[str]:
        backend = CountingBackend()
        monkeypatch.setitem(block_module._BACKENDS, "cpu", backend)
        cp = ContextParallel(dist.group.WORLD, sharding, exchange)
        leaves = [torch.randn(1, 1024, 8, 4, requires_grad=True) for _ in range(3)]
        cp.attend(*leaves).sum().backward()
        return backend.work.pairs

    ranks = run_ranks(8, rank_main)
    return {direction: [rank[direction] for rank in ranks] for direction in ("forward", "backward")}


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_zigzag_balances_the_work(exchange: ExchangeName, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 2% of equal, and none in vain: together, the causal triangle of every head."""
    for pairs in work_by_rank(exchange, "zigzag", monkeypatch).values():
        assert sum(pairs) == 8 * 8192 * 8193 // 2
        assert max(pairs) <= 1.02 * sum(pairs) / 8


@pytest.mark.parametrize("exchange", ["ring", "allgather"])
def test_contiguous_does_not(exchange: ExchangeName, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of 8 ranks has 1.9 times the average, and the others wait for it."""
    for pairs in work_by_rank(exchange, "contiguous", monkeypatch).values():
        assert max(pairs) / (sum(pairs) / 8) == pytest.approx(15 / 8, rel=0.01)
