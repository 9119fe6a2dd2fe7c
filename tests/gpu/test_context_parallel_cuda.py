"""The CUDA path over ranks, on one GPU: ranks that are threads, and a ring over NCCL that sends to itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from benchmarks.emulation import Alone, stand_in
from lhcp.attention import LighthouseConfig, Selection, lighthouse_attention, select
from lhcp.config import ExchangeName
from lhcp.distributed import ContextParallel
from lhcp.distributed.communicator import Communicator, GroupCommunicator
from lhcp.distributed.exchange.ring import RingExchange
from lhcp.distributed.link import Link, Transfer
from lhcp.distributed.sharding import ChunkLayout
from lhcp.distributed.threads import run_threads

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

EXCHANGES: list[ExchangeName] = ["ring", "allgather", "ulysses"]
NORM = LighthouseConfig(num_levels=3, pooling_factor=4, topk=128, num_strata=16)
CONFIGS = {"dense": None, "norm": NORM, "dilated": NORM.model_copy(update={"scorer": "dilated"})}
LENGTH, HEADS, WIDTH = 4096, 8, 64


def inputs(kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    generator = torch.Generator("cuda").manual_seed(kv_heads)
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    return [torch.randn(1, LENGTH, h, WIDTH, device="cuda", dtype=dtype, generator=generator) for h in heads]


def run(
    cp: ContextParallel, tensors: Sequence[Tensor], config: LighthouseConfig | None, selection: Selection | None
) -> list[Tensor]:
    """Output and gradients of this rank."""
    *qkv, grad = (cp.shard(x).clone() for x in tensors)
    leaves = [x.requires_grad_() for x in qkv]
    if config is None:
        out = cp.attend(*leaves)
    else:
        mine = None if selection is None else cp.shard(selection)
        out = lighthouse_attention(*leaves, config, selection=mine, context_parallel=cp)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def over_threads(
    world: int, exchange: ExchangeName, tensors: Sequence[Tensor], config: LighthouseConfig | None,
    selection: Selection | None,
) -> tuple[Tensor | None, list[Tensor]]:  # fmt: skip
    """Entries that the ranks select, output and gradients, whole."""

    def rank(communicator: Communicator) -> tuple[Tensor | None, list[Tensor]]:
        cp = ContextParallel(exchange=exchange, communicator=communicator)
        entries = None
        if config is not None:
            q, k, v = (cp.shard(x) for x in tensors[:3])
            entries = cp.unshard(select(q, k, config, v=v, context_parallel=cp)).entries
        return entries, [cp.unshard(x) for x in run(cp, tensors, config, selection)]

    return run_threads(world, rank)[0]


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world", [2, 8])
def test_float64_is_that_of_one_process(world: int, exchange: ExchangeName, kind: str, kv_heads: int) -> None:
    tensors, config = inputs(kv_heads, torch.float64), CONFIGS[kind]
    entries, many = over_threads(world, exchange, tensors, config, None)
    if config is not None:
        assert torch.equal(entries, select(*tensors[:2], config, v=tensors[2]).entries)
    for value, reference in zip(many, run(ContextParallel(), tensors, config, None), strict=True):
        assert float((value - reference).norm()) <= 1e-10 * float(reference.norm())


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("kind", ["dense", "norm"])
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world", [2, 8])
def test_bfloat16_is_as_exact_as_one_process(world: int, exchange: ExchangeName, kind: str, kv_heads: int) -> None:
    """Through Triton kernels and cuDNN: the same selection, errors at most 1.5x those of one process."""
    tensors, config = inputs(kv_heads, torch.bfloat16), CONFIGS[kind]
    selection = None if config is None else select(*tensors[:2], config)
    entries, many = over_threads(world, exchange, tensors, config, selection)
    assert selection is None or torch.equal(entries, selection.entries)
    exact = run(ContextParallel(), [x.double() for x in tensors], config, selection)
    one = run(ContextParallel(), tensors, config, selection)
    for value, alone, reference in zip(many, one, exact, strict=True):
        assert float((value.double() - reference).norm()) <= 1.5 * float((alone.double() - reference).norm())


class ToItself(Alone):
    """A rank of many whose links are NCCL's, of a group of one: it receives what it sends, or, where more or less
    comes than goes, what stands in for it."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size, torch.device("cuda"))
        self._nccl = GroupCommunicator(dist.group.WORLD)

    def link(self) -> Link:
        nccl = self._nccl.link()

        class SelfLink(Link):
            def post(self, *transfers: Transfer) -> None:
                super().post(*(to_itself(transfer) for transfer in transfers))

        return SelfLink(nccl._start)


def to_itself(transfer: Transfer) -> Transfer:
    send, receive = transfer.send, transfer.receive
    if receive is not None and (send is None or send.shape != receive.shape):
        stand_in(Transfer(0, send, send := torch.empty_like(receive)))
    return Transfer(0, None if receive is None else send, receive)


@pytest.fixture
def nccl() -> Iterator[None]:
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=HashStore(), rank=0, world_size=1, device_id=device)
    torch.use_deterministic_algorithms(True)  # or cuDNN's backward differs from run to run
    yield
    torch.use_deterministic_algorithms(False)
    dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 3, 7])
def test_the_ring_over_nccl_waits_for_what_it_receives(nccl: None, rank: int) -> None:
    """Bit for bit what copies give, ten times over: transfers run on a stream of their own, beside the compute."""
    q, k, v, grad = (x.repeat(1, 4, 1, 1) for x in inputs(8, torch.bfloat16))
    layout = ChunkLayout(8, "zigzag")
    copies, messages = (RingExchange(c, layout, "auto") for c in (Alone(rank, 8, q.device), ToItself(rank, 8)))
    out, lse = copies.forward(q, k, v)
    gradients = copies.backward(grad, q, k, v, out, lse)
    for _ in range(10):
        mine = messages.forward(q, k, v)
        assert torch.equal(mine[0], out)
        assert torch.equal(mine[1], lse)
        for value, expected in zip(messages.backward(grad, q, k, v, *mine), gradients, strict=True):
            assert torch.equal(value, expected)
