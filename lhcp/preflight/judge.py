"""Which nodes are bad, from what was measured: pure functions. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median


@dataclass(frozen=True)
class RankFigures:
    """One rank by itself; None: not measured."""

    rank: int
    node: str
    versions: Mapping[str, str]
    """By name: libraries, driver, this code, and the device's name."""
    gemm_tflops: float | None = None
    """Matrix products, bfloat16 on GPUs and float32 on CPUs, 1e12 operations per second."""
    copy_gb_s: float | None = None
    """Bytes read and written by copies in the device's memory, 1e9 per second."""
    free_gib: float | None = None
    """Memory of the device that nobody used."""
    failures: Sequence[str] = ()
    """What failed or was computed wrongly."""


@dataclass(frozen=True)
class PairFigures:
    """Two nodes that sent to each other at the same time."""

    nodes: tuple[str, str]
    gb_s: float
    """Each way, 1e9 bytes per second."""
    right: bool
    """What arrived is what was sent."""


@dataclass(frozen=True)
class SumFigures:
    """The sum over all ranks of nodes without a failure."""

    ranks: int
    bus_gb_s: float
    """2 (n - 1) / n of the bytes summed, 1e9 per second: comparable for any number of ranks n."""
    wrong: Sequence[str] = ()
    """Nodes with a rank that received a wrong sum."""


@dataclass
class NodeFigures:
    """A node: the slowest of its ranks, and the median of its pairs."""

    ranks: int = 0
    device: str = "none"
    gemm_tflops: float | None = None
    copy_gb_s: float | None = None
    free_gib: float | None = None
    pair_gb_s: float | None = None
    reasons: list[str] = field(default_factory=list)
    """Why it is bad; empty: it is not."""


def judge(
    ranks: Sequence[RankFigures], pairs: Sequence[PairFigures], total: SumFigures | None, slow: float
) -> dict[str, NodeFigures]:
    """Sum figures up by node, in the order of ranks, with the reasons why a node is bad.

    Args:
        ranks: all ranks.
        pairs: every two nodes that could be measured.
        total: None where there was nothing to sum.
        slow: a node below this share of the median over nodes is bad.
    """
    nodes: dict[str, NodeFigures] = {}
    for node in dict.fromkeys(figures.node for figures in ranks):
        own = [figures for figures in ranks if figures.node == node]
        rates = [pair.gb_s for pair in pairs if node in pair.nodes]
        nodes[node] = NodeFigures(
            ranks=len(own),
            device=own[0].versions.get("device", "none"),
            gemm_tflops=_least(figures.gemm_tflops for figures in own),
            copy_gb_s=_least(figures.copy_gb_s for figures in own),
            free_gib=_least(figures.free_gib for figures in own),
            pair_gb_s=median(rates) if rates else None,
            reasons=[f"rank {figures.rank}: {failure}" for figures in own for failure in figures.failures],
        )
    _judge_versions(nodes, ranks)
    _judge_rate(nodes, "gemm_tflops", "matrix products at {:.3g} TFLOP/s", slow)
    _judge_rate(nodes, "pair_gb_s", "{:.3g} GB/s to other nodes", slow)
    for node in _wrong_in_pairs(pairs):
        nodes[node].reasons.append("data that it exchanged with other nodes was wrong")
    for node in total.wrong if total else ():
        nodes[node].reasons.append("the sum over all ranks was wrong")
    return nodes


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def _judge_versions(nodes: Mapping[str, NodeFigures], ranks: Sequence[RankFigures]) -> None:
    """Name what differs from most ranks; of two that are as frequent, the first rank's counts as the usual one."""
    for name in dict.fromkeys(name for figures in ranks for name in figures.versions):
        # A rank that failed may not have come to find out all of them.
        known = [figures for figures in ranks if name in figures.versions or not figures.failures]
        usual, _ = Counter(figures.versions.get(name, "none") for figures in known).most_common(1)[0]
        for node, figures in nodes.items():
            others = {rank.versions.get(name, "none") for rank in known if rank.node == node} - {usual}
            figures.reasons += [f"{name} is {other}, and {usual} elsewhere" for other in sorted(others)]


def _judge_rate(nodes: Mapping[str, NodeFigures], name: str, text: str, slow: float) -> None:
    rates = {node: rate for node, figures in nodes.items() if (rate := getattr(figures, name)) is not None}
    usual = median(rates.values()) if rates else 0.0
    for node, rate in rates.items():
        if rate < slow * usual:
            share = f"{rate / usual:.0%} of the median over nodes, {usual:.3g}"
            nodes[node].reasons.append(f"{text.format(rate)}: {share}")


def _wrong_in_pairs(pairs: Sequence[PairFigures]) -> list[str]:
    """Of each pair with wrong data the node with more such pairs; both, where that does not tell them apart."""
    wrong = [pair.nodes for pair in pairs if not pair.right]
    count = Counter(node for nodes in wrong for node in nodes)
    return list(dict.fromkeys(n for nodes in wrong for n in nodes if count[n] == max(count[m] for m in nodes)))
