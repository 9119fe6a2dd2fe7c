"""Bytes that a rank sends for one attention layer, by closed formulas. Imports no torch.

Payload alone, counted where it leaves a rank once: what an all-gather, a reduce-scatter or an all-to-all must send at
least, whichever way a library routes it. Where ranks send differently, of the one that sends most.
"""

from __future__ import annotations

from dataclasses import dataclass

from lhcp.config import ExchangeName, LighthouseConfig
from lhcp.config.parallel import ulysses_copies


@dataclass(frozen=True)
class Bytes:
    """Of forward and of backward."""

    forward: int
    backward: int

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.forward + other.forward, self.backward + other.backward)

    @property
    def total(self) -> int:
        """Of both."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Attention:
    """The tensors of one attention layer: [batch, N, H or G, D], `itemsize` bytes an element."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    batch: int = 1

    @property
    def gradient_itemsize(self) -> int:
        """Bytes of an element where gradients are summed: float32, or float64 of float64."""
        return max(4, self.itemsize)


def exchange_bytes(exchange: ExchangeName, world: int, chunks_per_rank: int, length: int, of: Attention) -> Bytes:
    """What an exchange sends for causal attention over `length` tokens, shared by `world` ranks."""
    if world == 1:
        return Bytes(0, 0)
    row = of.batch * length // world * of.head_dim
    if exchange == "ulysses":
        heads = of.num_heads + of.num_kv_heads * ulysses_copies(world, of.num_heads, of.num_kv_heads)
        swapped = (world - 1) * row * 2 * heads // world * of.itemsize  # q and the output, k and v
        return Bytes(swapped, swapped)
    kv = row * 2 * of.num_kv_heads
    if exchange == "ring":  # in backward a rank sends less of keys and values, the more it sends of gradients
        there = (world - 1) * kv * of.itemsize
        return Bytes(there, there * (1 + chunks_per_rank) // 2)
    hops = world if exchange == "ring_flash_attn" else world - 1  # of gradients: the package's travel all the way
    return Bytes((world - 1) * kv * of.itemsize, (world - 1) * kv * of.itemsize + hops * kv * of.gradient_itemsize)


def halo_bytes(config: LighthouseConfig, world: int, chunks_per_rank: int, of: Attention) -> Bytes:
    """What Lighthouse sends besides: the last row of each coarser level of each chunk, to every other rank."""
    rows = (config.num_levels - 1) * chunks_per_rank * of.batch * of.num_heads * of.head_dim
    sent = (world - 1) * rows * of.gradient_itemsize
    return Bytes(sent, sent)


def scorer_bytes(
    exchange: ExchangeName, config: LighthouseConfig, world: int, chunks_per_rank: int, seq_len: int, of: Attention
) -> Bytes:
    """What a scorer sends: `dilated` attends twice among every delta-th token, with K and V repeated, forward only."""
    if config.scorer == "norm":
        return Bytes(0, 0)
    heads = of.num_heads * config.dilation
    dilated = Attention(heads, heads, of.head_dim, of.itemsize, of.batch)
    length = seq_len // config.dilation
    return Bytes(2 * exchange_bytes(exchange, world, chunks_per_rank, length, dilated).forward, 0)


def layer_bytes(
    exchange: ExchangeName,
    config: LighthouseConfig | None,
    world: int,
    chunks_per_rank: int,
    seq_len: int,
    of: Attention,
) -> Bytes:
    """What one layer sends: dense without a configuration, else Lighthouse.

    Args:
        exchange: how shards meet.
        config: resolved.
        world: W.
        chunks_per_rank: 2 under zigzag, 1 where contiguous.
        seq_len: N.
        of: the tensors.
    """
    if config is None:
        return exchange_bytes(exchange, world, chunks_per_rank, seq_len, of)
    sub = exchange_bytes(exchange, world, chunks_per_rank, config.subsequence_length(seq_len), of)
    scores = scorer_bytes(exchange, config, world, chunks_per_rank, seq_len, of)
    return sub + halo_bytes(config, world, chunks_per_rank, of) + scores
