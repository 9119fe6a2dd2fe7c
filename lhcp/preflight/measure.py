"""What preflight measures: one rank by itself, and the network between ranks."""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import P2POp, ProcessGroup

from lhcp.config import ConfigError
from lhcp.distributed.env import DeviceChoice, ProcessEnv
from lhcp.environment import versions
from lhcp.launch.snapshot import code_digest
from lhcp.preflight.judge import PairFigures, RankFigures, SumFigures

TIMEOUT = timedelta(minutes=5)
"""For one step of the measurement on all ranks."""
WARM_UP, REPEATS = 2, 10


def measure_rank(env: ProcessEnv, choice: DeviceChoice, matmul: int | None, size_mb: int | None) -> RankFigures:
    """This rank's device by itself. What goes wrong is part of the figures.

    Args:
        env: of this process.
        choice: of the device.
        matmul: rows and columns of the matrices; None: by device.
        size_mb: of what is copied, 2^20 bytes; None: by device.
    """
    node = os.environ.get("SLURMD_NODENAME", platform.node())
    found = versions() | {"code": code_digest()}
    try:
        device = env.device(choice)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        found |= _device_versions(device)
        free = _free_gib(device)
        tflops, right = gemm(matmul or (8192 if device.type == "cuda" else 512), device)
        copied = _copy_rate(_bytes(size_mb, device), device)
    except (RuntimeError, ConfigError) as error:
        return RankFigures(env.rank, node, found, failures=[(str(error) or repr(error)).splitlines()[0]])
    return RankFigures(env.rank, node, found, tflops, copied, free, [] if right else ["a matrix product was wrong"])


def gemm(n: int, device: torch.device) -> tuple[float, bool]:
    """1e12 operations per second of n x n products, and whether products with a known answer were right.

    Timed on random numbers, which cost power as a job's do. Known ones are of -1, 0 and 1, mostly 0: exact in any
    order of summation.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(n, n, generator=generator, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds, _ = _timed(lambda: torch.mm(a, b, out=out), device)

    for known in (a, b):
        drawn = torch.randint(0, 8, (n, n), generator=generator, device=device, dtype=torch.int8)
        known.copy_((drawn == 0).int() - (drawn == 1).int())
    probe = torch.randint(1, 1000, (n, 2), generator=generator, device=device).double()
    expected = a.double() @ (b.double() @ probe)

    def is_right() -> bool:
        torch.mm(a, b, out=out)
        return torch.equal(out.double() @ probe, expected)

    return 2 * n**3 / seconds / 1e12, all(is_right() for _ in range(REPEATS))


def _copy_rate(size: int, device: torch.device) -> float:
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds, _ = _timed(lambda: target.copy_(source), device)
    return 2 * size / seconds / 1e9


def _timed(
    call: Callable[[], object],
    device: torch.device,
    is_right: Callable[[], bool] = lambda: True,
    begin: Callable[[], object] = lambda: None,
) -> tuple[float, bool]:
    """Median seconds of `call`, and whether what it left was right every time; `begin` comes before each."""
    seconds, right = [], True
    for _ in range(WARM_UP + REPEATS):
        begin()
        _synchronize(device)
        started = time.perf_counter()
        call()
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
        right = is_right() and right
    return median(seconds[WARM_UP:]), right


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes(size_mb: int | None, device: torch.device) -> int:
    return (size_mb or (256 if device.type == "cuda" else 8)) << 20


def _device_versions(device: torch.device) -> dict[str, str]:
    if device.type == "cpu":
        return {"device": platform.processor() or platform.machine()}
    driver = Path("/proc/driver/nvidia/version")
    number = re.search(r"\s(\d+\.\d+\S*)", driver.read_text()) if driver.exists() else None
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    found = {"device": torch.cuda.get_device_name(device), "nccl": nccl}
    return found | ({"driver": number[1]} if number else {})


def _free_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / 2**20


def tournament(players: int) -> list[list[tuple[int, int]]]:
    """Rounds in which every two of `players` meet once, nobody in two pairs of a round (the circle method)."""
    circle: list[int | None] = [*range(players), *([None] if players % 2 else [])]
    rounds = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        meetings = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in meetings if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]  # the first stays, the others move on by one
    return rounds


def measure_network(
    ranks: Sequence[RankFigures], env: ProcessEnv, choice: DeviceChoice, size_mb: int | None
) -> tuple[list[PairFigures], SumFigures | None]:
    """Nodes in pairs, by their first ranks, and the sum over all ranks; the same on every rank (collective).

    Nodes with a failure, or with another device than most, take no part.

    Args:
        ranks: figures of all ranks, by rank.
        env: of this process.
        choice: of the device.
        size_mb: see `measure_rank`; of what is sent each way, and of what is summed.
    """
    members = participants(ranks)
    if len(members) < 2:
        return [], None
    group = dist.new_group(members, backend="nccl" if "nccl" in ranks[members[0]].versions else "gloo", timeout=TIMEOUT)
    leaders: dict[str, int] = {}
    for rank in members:
        leaders.setdefault(ranks[rank].node, rank)
    own = _Own()
    if env.rank in members:
        own = _take_part(group, leaders, env.device(choice), size_mb)
    everyone: list[_Own] = [own] * env.world_size
    dist.all_gather_object(everyone, own)
    return _pairs(leaders, everyone), _sum(ranks, members, everyone)


def participants(ranks: Sequence[RankFigures]) -> list[int]:
    """The ranks of nodes without a failure that have the device that most such nodes' ranks have."""
    failed = {figures.node for figures in ranks if figures.failures}
    devices = [figures.versions["device"] for figures in ranks if figures.node not in failed]
    usual = Counter(devices).most_common(1)[0][0] if devices else ""
    out = failed | {figures.node for figures in ranks if figures.versions.get("device") != usual}
    return [figures.rank for figures in ranks if figures.node not in out]


@dataclass
class _Own:
    """What one rank has seen of the network; a transfer is seconds, and whether the data were right."""

    size: int = 0
    sum: tuple[float, bool] = (0.0, True)
    by_peer: dict[int, tuple[float, bool]] = field(default_factory=dict)


def _take_part(group: ProcessGroup, leaders: Mapping[str, int], device: torch.device, size_mb: int | None) -> _Own:
    """One rank's part: the sum, then the rounds of the nodes' first ranks, which all ranks begin together."""
    rank, size = dist.get_rank(), _bytes(size_mb, device)
    names, first = list(leaders), min(leaders.values())
    own = _Own(size)
    if rank == first:
        progress(f"a sum over {dist.get_world_size(group)} ranks")
    # First: point-to-point transfers of NCCL need a group that all its ranks have used.
    own.sum = _summed(group, size, device)
    for pairs in tournament(len(names)):
        _meet(group, device)
        if rank == first:
            progress("pairs " + ", ".join(f"{names[a]}-{names[b]}" for a, b in pairs))
        for pair in pairs:
            both = [leaders[names[player]] for player in pair]
            if rank in both:
                peer = both[both[0] == rank]
                own.by_peer[peer] = _exchanged(group, peer, size, device)
    _meet(group, device)
    return own


def progress(text: str) -> None:
    """On stderr, so that one sees where a hang is."""
    print(f"preflight: {text}", file=sys.stderr, flush=True)


def _meet(group: ProcessGroup, device: torch.device) -> None:
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    _synchronize(device)


def _summed(group: ProcessGroup, size: int, device: torch.device) -> tuple[float, bool]:
    """Seconds of an all-reduce of `size` bytes, and whether every sum was right."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    # Whole numbers, so that the sum is exact in any order.
    pattern = _pattern(size // 4, device).float()
    expected = pattern * ranks + ranks * (ranks - 1) // 2
    values = torch.empty_like(pattern)

    def begin() -> None:
        torch.add(pattern, rank, out=values)
        _meet(group, device)

    return _timed(lambda: dist.all_reduce(values, group=group), device, lambda: torch.equal(values, expected), begin)


def _exchanged(group: ProcessGroup, peer: int, size: int, device: torch.device) -> tuple[float, bool]:
    """Seconds in which `size` bytes went each way between this rank and `peer`, and whether they were right."""
    rank, pattern = dist.get_rank(), _pattern(size, device)
    send, expected = pattern + rank % 256, pattern + peer % 256  # bytes: sums wrap
    receive = torch.empty_like(send)

    def exchange() -> None:
        transfers = [P2POp(dist.irecv, receive, peer, group), P2POp(dist.isend, send, peer, group)]
        for work in dist.batch_isend_irecv(transfers):
            work.wait()

    return _timed(exchange, device, lambda: torch.equal(receive, expected), lambda: receive.zero_())


def _pattern(length: int, device: torch.device) -> Tensor:
    """Bytes that no shift by a power of two leaves alone, uint8."""
    period = torch.arange(251, dtype=torch.uint8, device=device)
    return period.repeat(length // 251 + 1)[:length]


def _pairs(leaders: Mapping[str, int], everyone: Sequence[_Own]) -> list[PairFigures]:
    """Every pair once, from what its two ranks saw: the slower, and right if both were."""
    found = []
    for (one, a), (other, b) in combinations(leaders.items(), 2):
        seen = everyone[a].by_peer[b], everyone[b].by_peer[a]
        seconds, right = max(s for s, _ in seen), all(right for _, right in seen)
        found.append(PairFigures((one, other), everyone[a].size / seconds / 1e9, right))
    return found


def _sum(ranks: Sequence[RankFigures], members: Sequence[int], everyone: Sequence[_Own]) -> SumFigures:
    count, size = len(members), everyone[members[0]].size
    seconds = max(everyone[rank].sum[0] for rank in members)
    wrong = dict.fromkeys(ranks[rank].node for rank in members if not everyone[rank].sum[1])
    return SumFigures(count, 2 * (count - 1) / count * size / seconds / 1e9, list(wrong))
