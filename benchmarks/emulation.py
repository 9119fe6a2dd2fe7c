"""One rank's share of a layer without the other ranks, and what its transfers would take on a given network.

Everything that the rank computes runs, at its true sizes and in order; what others would send is a copy of its own.
Where transfers begin and where they are waited for is noted, and `exposed_ms` replays that against a model of the
network: latency and bandwidth, one transfer after the other.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.common import LEAST_MS, WARM_UP
from lhcp.distributed.link import Link, Transfer


@dataclass(frozen=True)
class Network:
    """One direction of a rank's link to the others."""

    gb_per_s: float
    """10^9 bytes a second."""
    latency_us: float
    """From the last byte sent to its arrival, software included."""
    source: str

    def scaled(self, factor: float) -> Network:
        """With `factor` times the bandwidth."""
        return Network(self.gb_per_s * factor, self.latency_us, self.source)


NETWORKS = {
    "NVLink 4": Network(450.0, 10.0, "NVIDIA H100 data sheet: 900 GB/s a GPU, both directions together"),
    "InfiniBand NDR": Network(50.0, 20.0, "NVIDIA ConnectX-7 data sheet: 400 Gb/s a port, of which a GPU has one"),
}
"""Bandwidths are the vendor's; latencies, small beside them, are assumed."""
FACTORS = (0.5, 1.0, 2.0)
"""Of the bandwidth, at which overhead is projected."""

Moment = float | torch.cuda.Event
"""Seconds, or an event of the GPU's stream."""


@dataclass(frozen=True)
class Pass:
    """One forward, or forward and backward, of a rank.

    Attributes:
        compute_ms: all of it, without the copies that stand in for transfers.
        host_ms: what the host took to launch it; on a CPU, to run it.
        marks: in order: whether a transfer begins, or else is waited for; its number; milliseconds of compute by then.
        nbytes: that each transfer sends.
        busy: the larger of what each sends and receives.
    """

    compute_ms: float
    host_ms: float
    marks: tuple[tuple[bool, int, float], ...]
    nbytes: tuple[int, ...]
    busy: tuple[int, ...]


@dataclass
class _Recording:
    """A pass that may not have ended yet: moments, which a GPU reaches later, or at every replay of a graph."""

    on_gpu: bool
    in_graph: bool = False
    moments: list[Moment] = field(default_factory=list)
    kinds: list[tuple[str, int]] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    busy: list[int] = field(default_factory=list)

    def note(self, kind: str, transfer: int = -1) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True, external=self.in_graph)
            event.record()
            self.moments.append(event)
        else:
            self.moments.append(time.perf_counter())
        self.kinds.append((kind, transfer))

    def read(self, host_ms: float) -> Pass:
        """Once the device has done all of it."""
        marks, copied, copy_began = [], 0.0, 0.0
        for (kind, transfer), moment in zip(self.kinds, self.moments, strict=True):
            at = self._milliseconds_to(moment)
            if kind == "copied":
                copied += at - copy_began
            elif kind in ("begin", "wait"):
                copy_began = at
                marks.append((kind == "begin", transfer, at - copied))
        return Pass(at - copied, host_ms, tuple(marks), tuple(self.nbytes), tuple(self.busy))

    def _milliseconds_to(self, moment: Moment) -> float:
        first = self.moments[0]
        if isinstance(moment, float):
            assert isinstance(first, float)
            return 1e3 * (moment - first)
        assert not isinstance(first, float)
        return float(first.elapsed_time(moment))


class Alone:
    """`lhcp.distributed.communicator.Communicator` of one rank of `size` whose transfers are copies of its own data."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size = rank, size
        self._on_gpu = device.type == "cuda"
        self._recording = _Recording(self._on_gpu)

    def passes(self, call: Callable[[], object], repeats: int) -> list[Pass]:
        """`call` after a warm-up, `repeats` times.

        On a GPU as a CUDA graph, replayed for `LEAST_MS` altogether: it never waits for the host, and gets as hot as in
        training. What the host takes is the median of `repeats` launches before, of a long call of its last warm-up.
        """
        done = self._run(call)
        for _ in range(1, WARM_UP):
            if done.compute_ms < LEAST_MS:
                done = self._run(call)
        if not self._on_gpu:
            return [self._run(call) for _ in range(repeats)]
        launches = [self._run(call) for _ in range(repeats)] if done.compute_ms < LEAST_MS else [done]
        host_ms = statistics.median(launch.host_ms for launch in launches)
        self._recording = _Recording(self._on_gpu, in_graph=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._noted(call)
        passes = []
        for _ in range(repeats):
            for _ in range(math.ceil(LEAST_MS / repeats / done.compute_ms)):
                graph.replay()
            torch.cuda.synchronize()
            passes.append(self._recording.read(host_ms))
        return passes

    def _run(self, call: Callable[[], object]) -> Pass:
        self._recording = _Recording(self._on_gpu)
        started = time.perf_counter()
        self._noted(call)
        host_ms = 1e3 * (time.perf_counter() - started)
        if self._on_gpu:
            torch.cuda.synchronize()
        return self._recording.read(host_ms)

    def _noted(self, call: Callable[[], object]) -> None:
        self._recording.note("start")
        call()
        self._recording.note("end")

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Communicator.all_gather`."""
        x = x.contiguous()
        return self._at_once((self.size - 1) * x.nbytes, lambda: torch.stack([x] * self.size))

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """See `Communicator.reduce_scatter`."""
        x = x.contiguous()
        return self._at_once(x.nbytes - x[0].nbytes, x[self.rank].clone)

    def all_to_all(self, x: Tensor) -> Tensor:
        """See `Communicator.all_to_all`."""
        x = x.contiguous()
        return self._at_once(x.nbytes - x[0].nbytes, x.clone)

    def link(self) -> Link:
        """See `Communicator.link`."""

        def begin(transfers: Sequence[Transfer]) -> Callable[[], None]:
            sent = sum(t.send.nbytes for t in transfers if t.send is not None)
            received = sum(t.receive.nbytes for t in transfers if t.receive is not None)
            if sent == received == 0:
                return lambda: None
            number = self._begin(sent, received)
            for transfer in transfers:
                stand_in(transfer)
            self._recording.note("copied")
            return lambda: self._recording.note("wait", number)

        return Link(begin)

    def _at_once(self, nbytes: int, copy: Callable[[], Tensor]) -> Tensor:
        number = self._begin(nbytes)
        out = copy()
        self._recording.note("copied")
        self._recording.note("wait", number)
        return out

    def _begin(self, sent: int, received: int = 0) -> int:
        """`received` may be left out where it is as much as is sent."""
        number = len(self._recording.nbytes)
        self._recording.nbytes.append(sent)
        self._recording.busy.append(max(sent, received))
        self._recording.note("begin", number)
        return number


def stand_in(transfer: Transfer) -> None:
    """Receive what is sent, over and over; zeros where nothing is."""
    if transfer.receive is None:
        return
    out = transfer.receive.flatten()
    mine = torch.zeros_like(out) if transfer.send is None else transfer.send.flatten()
    for part in out.split(len(mine)):
        part.copy_(mine[: len(part)])


def exposed_ms(done: Pass, network: Network) -> float:
    """How long the rank of a pass waits for its transfers, if the others do as it does.

    A transfer leaves when it is posted and those before it have left, both ways at once, and has arrived a latency
    after its last byte left. What is waited for delays everything after it.
    """
    waited, free = 0.0, 0.0
    arrival: dict[int, float] = {}
    for begins, transfer, compute in done.marks:
        now = compute + waited
        if begins:
            free = max(now, free) + done.busy[transfer] / network.gb_per_s / 1e6
            arrival[transfer] = free + network.latency_us / 1e3
        else:
            waited += max(0.0, arrival[transfer] - now)
    return waited
