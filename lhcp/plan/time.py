"""Seconds of a training step on one GPU, part by part. Names are those of `share.py`.

Transfers run beside compute where the trainer lets them: of those only what exceeds the compute counts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache

from lhcp import volume
from lhcp.config import StageMode
from lhcp.plan.gpus import Gpu
from lhcp.plan.share import ITEMSIZE, Layer, Share


@dataclass(frozen=True)
class Seconds:
    """By part."""

    gemm: float = 0.0
    """Matrix products of the layers."""
    attention: float = 0.0
    scorer: float = 0.0
    """The scorer `dilated`."""
    lighthouse: float = 0.0
    """Pool, score, select, gather and scatter back, with their gradients."""
    elementwise: float = 0.0
    """Norms, RoPE, SwiGLU, residuals."""
    loss: float = 0.0
    """With the products of the output head."""
    optimizer: float = 0.0
    offload: float = 0.0
    """Exposed: what copies to and from the host exceed the compute by."""
    exchange: float = 0.0
    """Exposed, of context parallelism."""
    fsdp: float = 0.0
    """Exposed, of gathering parameters and summing gradients."""

    @property
    def total(self) -> float:
        """Of all parts."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, factor: float) -> Seconds:
        return Seconds(*(getattr(self, field.name) * factor for field in fields(self)))


def step_time(share: Share, gpu: Gpu, layers: Sequence[Layer]) -> Seconds:
    """Of one optimizer step in a stage with these layers."""
    one_pass = loss(share, gpu) + _root_transfers(share, gpu)
    for layer, count in Counter(layers).items():
        one_pass += layer_time(share, gpu, layer) * count
    return one_pass * share.passes + optimizer(share, gpu)


@cache
def layer_time(share: Share, gpu: Gpu, layer: Layer) -> Seconds:
    """Forward and backward of one micro-batch in one layer, recomputation and exposed transfers included."""
    forward = forward_time(share, gpu, layer.kind)
    backward = backward_time(share, gpu, layer.kind)
    if layer.recompute != "none":
        backward += again_time(share, gpu, layer)
    forward += _exchange(share, gpu, layer.kind, backward=False)
    backward += _exchange(share, gpu, layer.kind, backward=True)
    if layer.recompute == "full":
        backward += _exchange(share, gpu, layer.kind, backward=False, scored=False)
    copied = share.tokens * share.width * ITEMSIZE / gpu.pcie if layer.offloaded else 0.0
    gathered, summed = _sharded(share, gpu, ITEMSIZE), _sharded(share, gpu, 4)
    return (
        forward
        + _exposed(forward.total, copied, gathered * share.block_parameters)
        + backward
        + _exposed(backward.total, copied, (gathered + summed) * share.block_parameters)
    )


def _exposed(compute: float, copied: float, sharded: float) -> Seconds:
    """Of a layer's copies and of FSDP's transfers, which go different ways."""
    return Seconds(offload=max(0.0, copied - compute), fsdp=max(0.0, sharded - compute))


def forward_time(share: Share, gpu: Gpu, kind: StageMode) -> Seconds:
    """A layer's forward: 2 FLOPs for each weight and token; 9 E + 2 (HD + GD) + 3 F elements in elementwise passes.

    Those, read and written: norm 2 E; RoPE 2 (HD + GD); residual and norm 4 E; SwiGLU 3 F; residual 3 E.
    """
    seconds = Seconds(
        gemm=2 * share.tokens * share.block_parameters / gpu.gemm_flops,
        attention=attention_flops(share, kind) / gpu.attention_forward_flops,
        elementwise=_passes(share, gpu, 9 * share.width + 2 * share.q + share.kv + 3 * share.ffn),
    )
    return seconds + _around(share, gpu, kind) + _scorer(share, gpu, kind)


def backward_time(share: Share, gpu: Gpu, kind: StageMode) -> Seconds:
    """A layer's backward: twice the products of forward, 2.5 times its attention, 8 E + 2 HD + 4 GD + 5 F elements.

    Those, read and written: SwiGLU 5 F; two norms with residuals, 4 E each; RoPE and joining gradients of q, k, v.
    """
    return Seconds(
        gemm=4 * share.tokens * share.block_parameters / gpu.gemm_flops,
        attention=2.5 * attention_flops(share, kind) / gpu.attention_backward_flops,
        elementwise=_passes(share, gpu, 8 * share.width + 2 * share.q + 2 * share.kv + 5 * share.ffn),
    ) + _around(share, gpu, kind)


def again_time(share: Share, gpu: Gpu, layer: Layer) -> Seconds:
    """Forward again: without the last projection, residual and scorer, and, if `selective`, without attention."""
    products = share.block_parameters - share.ffn * share.width
    forward = attention_flops(share, layer.kind) if layer.recompute == "full" else 0.0
    return Seconds(
        gemm=2 * share.tokens * products / gpu.gemm_flops,
        attention=forward / gpu.attention_forward_flops,
        elementwise=_passes(share, gpu, 6 * share.width + 2 * share.q + share.kv + 3 * share.ffn),
    ) + _around(share, gpu, layer.kind)


def attention_flops(share: Share, kind: StageMode) -> float:
    """Forward, of this rank: 4 HD for each of rows^2 / 2 causal pairs of a sequence, shared by W ranks.

    Where sharding leaves the last rank (2 W - 1) / W times the average, that rank's.
    """
    pairs = share.attended(kind) ** 2 / 2 * share.sequences / share.cp
    return 4 * pairs * share.q * (1.0 if share.balanced else (2 * share.cp - 1) / share.cp)


def loss(share: Share, gpu: Gpu) -> Seconds:
    """6 n V E FLOPs, forward and backward at once; n V elements written and read twice, their gradients written."""
    logits = share.tokens * share.vocabulary
    flops = 6.0 * logits * share.width
    return Seconds(loss=flops / gpu.gemm_flops + 4.0 * logits * ITEMSIZE / gpu.pass_bandwidth)


def optimizer(share: Share, gpu: Gpu) -> Seconds:
    """AdamW on this rank's share of the parameters."""
    return Seconds(optimizer=gpu.optimizer_bytes * share.parameters / share.ranks / gpu.pass_bandwidth)


def _passes(share: Share, gpu: Gpu, elements: int) -> float:
    """Seconds in which so many elements of each token are read or written."""
    return share.tokens * elements * ITEMSIZE / gpu.pass_bandwidth


def _around(share: Share, gpu: Gpu, kind: StageMode) -> Seconds:
    """Steps around attention, in one direction: q, k, v and output, of tokens and of rows, are moved once."""
    if kind == "dense":
        return Seconds()
    moved = (share.tokens + share.rows(kind)) * (2 * share.q + share.kv) * ITEMSIZE
    return Seconds(lighthouse=moved / gpu.around_bandwidth)


def _scorer(share: Share, gpu: Gpu, kind: StageMode) -> Seconds:
    """Two causal attentions among every delta-th token, in delta times the heads; their outputs are read once."""
    config = share.attention
    if kind == "dense" or config is None or config.scorer == "norm":
        return Seconds()
    flops = 2 * attention_flops(share, "dense") / config.dilation
    return Seconds(scorer=flops / gpu.attention_forward_flops + _passes(share, gpu, 2 * share.q))


def _link(share: Share, gpu: Gpu) -> tuple[float, float]:
    """Bandwidth (B/s) and latency (s) between the ranks of a context-parallel group, which are neighbours."""
    inside = share.gpus_per_node % share.cp == 0
    return (gpu.nvlink, gpu.nvlink_latency) if inside else (gpu.network, gpu.network_latency)


def tensors(share: Share) -> volume.Attention:
    """Of a micro-batch's attention, as `lhcp.volume` has them."""
    return volume.Attention(share.heads, share.kv_heads, share.head_dim, ITEMSIZE, share.sequences)


def _exchange(share: Share, gpu: Gpu, kind: StageMode, *, backward: bool, scored: bool = True) -> Seconds:
    """Exposed, of one direction of one attention, its halo and its scorer.

    A ring hides transfers behind its attention (the package's not the gradients' last), the others hide nothing. What
    kernels lose to transfers beside them, and ranks to the slowest of them, is not in it.
    """
    if share.cp == 1:
        return Seconds()
    bandwidth, latency = _link(share, gpu)
    of, ring = tensors(share), share.exchange in ("ring", "ring_flash_attn")
    sent = volume.exchange_bytes(share.exchange, share.cp, share.chunks_per_rank, share.attended(kind), of)
    attention = attention_flops(share, kind)
    compute = 2.5 * attention / gpu.attention_backward_flops if backward else attention / gpu.attention_forward_flops
    exposed = _waited((sent.backward if backward else sent.forward) / bandwidth, compute if ring else 0.0)
    if share.exchange == "ring_flash_attn" and backward:
        exposed += share.rows(kind) * share.kv * of.gradient_itemsize / bandwidth
    exposed += latency
    config = share.attention
    if kind == "lighthouse" and config is not None:
        exposed += volume.halo_bytes(config, share.cp, share.chunks_per_rank, of).forward / bandwidth + latency
        if scored and not backward:
            there = volume.scorer_bytes(share.exchange, config, share.cp, share.chunks_per_rank, share.length, of)
            exposed += _waited(there.forward / bandwidth, _scorer(share, gpu, kind).scorer if ring else 0.0)
    return Seconds(exchange=exposed)


def _waited(transfer: float, compute: float) -> float:
    return max(0.0, transfer - compute)


def _sharded(share: Share, gpu: Gpu, itemsize: int) -> float:
    """Seconds a parameter, of an all-gather or a reduce-scatter over all ranks.

    A GPU receives (R - 1) / R of the whole over NVLink; a node (nodes - 1) / nodes, over the links of all its GPUs.
    """
    if share.ranks == 1:
        return 0.0
    nodes = -(-share.ranks // share.gpus_per_node)
    inside = itemsize * (share.ranks - 1) / share.ranks / gpu.nvlink
    between = itemsize * (nodes - 1) / nodes / (gpu.network * share.gpus_per_node)
    return max(inside, between)


def _root_transfers(share: Share, gpu: Gpu) -> Seconds:
    """Embedding and head are gathered before a micro-batch, and their gradients summed after it: beside nothing."""
    return Seconds(fsdp=share.root_parameters * (_sharded(share, gpu, ITEMSIZE) + _sharded(share, gpu, 4)))
