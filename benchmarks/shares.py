"""What a rank's share of a layer takes: among the other ranks, alone, and as a share of one device's time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from benchmarks import layer as layers
from benchmarks.common import Record, largest_over_ranks, peak_memory_gib, reset_peak_memory, timed
from benchmarks.emulation import FACTORS, NETWORKS, Alone, Pass, exposed_ms
from lhcp.config import ExchangeName, RunConfig
from lhcp.distributed import ContextParallel
from lhcp.distributed.communicator import GroupCommunicator
from lhcp.distributed.link import Transfer
from lhcp.volume import Attention, layer_bytes

KINDS = ("forward", "forward_backward")
LIGHTHOUSE, DENSE = "lighthouse", "dense"


def one_device(config: RunConfig, layer: layers.Layer, repeats: int, with_dense: bool) -> Record:
    """Milliseconds of the whole layer on one device, the measure of all shares (collective).

    Lighthouse is measured at N tokens. Dense attention is measured at N / W, by PyTorch's own call, and taken W^2
    times: at N it takes long, and causal work grows by the square.
    """
    tokens, world = config.seq_len, config.parallel.cp
    sparse = layers.measure(layers.lighthouse(config.attention, ContextParallel()), layer.inputs(tokens, 1), repeats)
    found = {LIGHTHOUSE: {kind: sparse[kind]["p50_ms"] for kind in KINDS}}
    if with_dense:
        dense = layers.measure(layers.sdpa, layer.inputs(tokens // world, 1), repeats)
        found[DENSE] = {kind: dense[kind]["p50_ms"] * world**2 for kind in KINDS}
    return found


def measured(
    config: RunConfig, exchange: ExchangeName, layer: layers.Layer, repeats: int, with_dense: bool, group: ProcessGroup
) -> Record:
    """Times among the ranks of `group`, and of what this one computes without them (collective).

    Returns:
        By attention: `forward` and `forward_backward` of the slowest rank, peak memory, `tokens_per_s_per_rank`,
        `bytes` of the rank that sends most, `compute_ms` of the slowest rank alone, and `exposed_ms`: what transfers
        add. Of the ring, `hop_gb_per_s`: 10^9 bytes a second of keys and values that go one rank on, beside no compute.
    """
    parallel = config.parallel
    cp = ContextParallel(group, parallel.sharding, exchange, parallel.block_backend)
    tokens = config.seq_len // cp.size
    inputs = layer.inputs(tokens, seed=1 + cp.rank)
    found: Record = {}
    for name, attention in _attentions(config, cp, with_dense).items():
        times = layers.measure(attention, inputs, repeats)
        times["tokens_per_s_per_rank"] = tokens / times["forward_backward"]["p50_ms"] * 1e3
        times["bytes"] = _bytes(config, exchange, name)
        if cp.size > 1 and exchange != "ring_flash_attn":  # whose transfers are its own
            alone = _alone(config, exchange, cp.rank, layer.device)
            passes = _passes(alone[0], _attentions(config, alone[1], with_dense)[name], inputs, repeats)
            compute = {kind: largest_over_ranks(_median(passes[kind]), layer.device) for kind in KINDS}
            times["compute_ms"] = compute
            times["host_ms"] = {kind: largest_over_ranks(_host(passes[kind]), layer.device) for kind in KINDS}
            times["exposed_ms"] = {kind: times[kind]["p50_ms"] - compute[kind] for kind in KINDS}
        if cp.size > 1 and exchange == "ring":
            attended = config.attention.subsequence_length(config.seq_len) if name == LIGHTHOUSE else config.seq_len
            times["hop_gb_per_s"] = _hop(GroupCommunicator(group), layer, attended // cp.size, repeats)
        found[name] = times
    return found


def emulated(config: RunConfig, exchange: ExchangeName, layer: layers.Layer, repeats: int, with_dense: bool) -> Record:
    """Each rank's share in turn, on one device, and what transfers would add.

    Dense attention is run for the first and the last rank alone: under zigzag sharding all have as many pairs, where
    contiguous the last has most.

    Returns:
        By attention: `compute_ms` of each rank that was run, peak memory and `bytes` (counted) of the rank that has
        most, and
        `projected_exposed_ms` by network and factor of its bandwidth, of the slowest rank.
    """
    world, found = config.parallel.cp, Record()
    inputs = layer.inputs(config.seq_len // world, seed=1)
    for name in (LIGHTHOUSE, DENSE) if with_dense else (LIGHTHOUSE,):
        ranks = range(world) if name == LIGHTHOUSE else (0, world - 1)
        by_rank: dict[int, dict[str, list[Pass]]] = {}
        memory = 0.0
        for rank in ranks:
            alone, cp = _alone(config, exchange, rank, layer.device)
            reset_peak_memory(layer.device)
            layers.forward_backward(_attentions(config, cp, True)[name], inputs)
            memory = max(memory, peak_memory_gib(layer.device))
            by_rank[rank] = _passes(alone, _attentions(config, cp, True)[name], inputs, repeats)
        sent = {kind: max(sum(of_rank[kind][0].nbytes) for of_rank in by_rank.values()) for kind in KINDS}
        counted = {"forward": sent["forward"], "backward": sent["forward_backward"] - sent["forward"]}
        assert counted == _bytes(config, exchange, name), (counted, _bytes(config, exchange, name))
        found[name] = {
            "compute_ms": {kind: {str(rank): _median(by_rank[rank][kind]) for rank in ranks} for kind in KINDS},
            "host_ms": {kind: max(_host(by_rank[rank][kind]) for rank in ranks) for kind in KINDS},
            "peak_memory_gib": memory,
            "bytes": counted,
            "projected_exposed_ms": {
                network: {str(factor): _projected(by_rank, network, factor) for factor in FACTORS}
                for network in NETWORKS
            },
        }
    return found


def _hop(communicator: GroupCommunicator, layer: layers.Layer, tokens: int, repeats: int) -> float:
    """10^9 bytes a second of the keys and values of so many tokens, all sent one rank on (collective)."""
    _, k, v, _ = layer.inputs(tokens, seed=0)
    link, kv = communicator.link(), torch.stack((k, v))
    hop_on = Transfer(1, kv, torch.empty_like(kv))

    def hop() -> None:
        link.post(hop_on)
        link.wait()

    return kv.nbytes / timed(hop, layer.device, repeats)["p50_ms"] / 1e6


def _attentions(config: RunConfig, cp: ContextParallel, with_dense: bool) -> dict[str, layers.Attention]:
    sparse = {LIGHTHOUSE: layers.lighthouse(config.attention, cp)}
    return sparse | ({DENSE: cp.attend} if with_dense else {})


def _alone(config: RunConfig, exchange: ExchangeName, rank: int, device: torch.device) -> tuple[Alone, ContextParallel]:
    parallel = config.parallel
    alone = Alone(rank, parallel.cp, device)
    return alone, ContextParallel(None, parallel.sharding, exchange, parallel.block_backend, communicator=alone)


def _passes(alone: Alone, attention: layers.Attention, inputs: Sequence[Tensor], repeats: int) -> dict[str, list[Pass]]:
    @torch.no_grad()
    def forward() -> Any:
        return attention(*inputs[:3])

    calls: dict[str, Callable[[], Any]] = {
        "forward": forward,
        "forward_backward": lambda: layers.forward_backward(attention, inputs),
    }
    return {kind: alone.passes(call, repeats) for kind, call in calls.items()}


def _median(passes: Sequence[Pass]) -> float:
    return statistics.median(one.compute_ms for one in passes)


def _host(passes: Sequence[Pass]) -> float:
    return statistics.median(one.host_ms for one in passes)


def _projected(by_rank: dict[int, dict[str, list[Pass]]], network: str, factor: float) -> dict[str, float]:
    """What transfers add to the slowest rank's compute, where all wait for the rank that is done last."""
    link = NETWORKS[network].scaled(factor)
    found = {}
    for kind in KINDS:
        done = [
            statistics.median(one.compute_ms + exposed_ms(one, link) for one in of_rank[kind])
            for of_rank in by_rank.values()
        ]
        found[kind] = max(done) - max(_median(of_rank[kind]) for of_rank in by_rank.values())
    return found


def _bytes(config: RunConfig, exchange: ExchangeName, name: str) -> dict[str, int]:
    """By the closed formula."""
    model, parallel = config.model, config.parallel
    itemsize = getattr(torch, config.activation_dtype).itemsize
    of = Attention(model.num_heads, model.num_kv_heads, model.head_dim, itemsize)
    attention = config.attention if name == LIGHTHOUSE else None
    sent = layer_bytes(exchange, attention, parallel.cp, parallel.num_chunks // parallel.cp, config.seq_len, of)
    return {"forward": sent.forward, "backward": sent.backward}
