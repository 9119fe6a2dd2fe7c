"""Memory of a training step on one GPU and its host, part by part, in bytes.

The peak is what is always there, what layers keep for backward, and the most that one moment needs besides: the forward
of a layer, the loss, or the backward of a layer. Names are those of `share.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from lhcp.config import StageMode
from lhcp.plan.share import ITEMSIZE, Layer, Share

Parts = dict[str, int]
LOSS_ROWS = 8_192
"""Tokens whose logits exist at a time."""
RING_PARTS = 5
"""Of a gradient, that wait to be added."""
INPUT = "input"
ATTENDED = "attention output, log-sum-exp, selected rows"
PRODUCT = "silu(gate) x up"


@dataclass(frozen=True)
class Memory:
    """Of one stage. All in bytes."""

    always: Parts
    """As long as a step takes."""
    kept: Parts
    """By layers, for backward, when the peak is reached."""
    moment: str
    """When the peak is reached."""
    working: Parts
    """What that moment needs besides."""
    host: int
    """Pinned host memory for one GPU."""

    @property
    def peak(self) -> int:
        """Of the GPU's memory."""
        return sum(self.always.values()) + sum(self.kept.values()) + sum(self.working.values())


def memory_of(share: Share, layers: Sequence[Layer]) -> Memory:
    """Of a stage with these layers."""
    found = []
    before = 0
    for i, layer in enumerate(layers):  # a moment in a layer comes with what the layers before it keep
        name, live = _largest_moment(share, layer)
        needed = before + sum(live.values()) + sum(_beside(share, layers, i).values())
        found.append((needed, i, name))
        before += sum(kept(share, layer).values())
    in_loss = loss(share)
    found.append((before + sum(in_loss.values()), len(layers), "loss"))
    _, i, name = max(found)
    in_a_layer = i < len(layers)
    return Memory(
        always=always(share),
        kept=_sum(kept(share, layer) for layer in layers[:i]),
        moment=f"{name} of layer {i}" if in_a_layer else "the loss",
        working=_largest_moment(share, layers[i])[1] | _beside(share, layers, i) if in_a_layer else in_loss,
        host=sum(layer.offloaded for layer in layers) * share.tokens * share.width * ITEMSIZE,
    )


def _beside(share: Share, layers: Sequence[Layer], i: int) -> Parts:
    """While layer `i` runs: the next input on its way back, gradients of layers that have had their backward."""
    parts = {}
    if i > 0 and layers[i - 1].offloaded:
        parts["an input on its way from the host"] = share.tokens * share.width * ITEMSIZE
    if share.passes == 1:
        done = (len(layers) - 1 - i) * share.block_parameters
        parts["gradients so far, float32"] = 4 * done // share.ranks
    return parts


@cache
def always(share: Share) -> Parts:
    """What is there throughout: FSDP2 over all R ranks, and copies of gathered parameters in the compute dtype.

    The root (embedding, head, last norm) is gathered for the whole step, a layer's parameters while it runs, the next
    layer's with them; so are their gradients, until they are summed over ranks.
    """
    own = share.parameters / share.ranks
    gathered = ITEMSIZE * (share.root_parameters + 2 * share.block_parameters)
    return {
        "parameters, float32": int(4 * own),
        # Of one micro-batch they come into being as backward goes on, when what layers have kept is gone.
        "gradients, float32": int(4 * own) if share.passes > 1 else 0,
        "AdamW moments": int(8 * own),
        "gathered parameters": gathered,
        "their gradients": gathered,
        "RoPE tables": 2 * share.tokens * share.head_dim // 2 * 4,
    }


@cache
def kept(share: Share, layer: Layer) -> Parts:
    """What a layer keeps on the GPU from forward to backward."""
    if layer.recompute == "none":
        whole = _saved_by_attention(share, layer.kind) | _saved_by_feed_forward(share)
        return {"activations of layers that are not recomputed": sum(whole.values())}
    row = share.tokens * share.width * ITEMSIZE
    parts = {} if layer.offloaded else {"inputs of recomputed layers": row}
    return parts | {ATTENDED: _kept_of_attention(share, layer)}


def _kept_of_attention(share: Share, layer: Layer) -> int:
    rows, selected = share.rows(layer.kind), 0
    if layer.kind == "lighthouse":
        selected = 4 * share.kv_heads * rows
    if layer.recompute == "full":
        return selected
    return rows * share.q * ITEMSIZE + 4 * rows * share.heads + selected


def _saved_by_attention(share: Share, kind: StageMode) -> Parts:
    """What the attention half of a compiled layer needs in backward.

    In a dense layer, v is a part of the product that q and k, too, are parts of before RoPE, and keeps all of it.
    """
    n, rows = share.tokens, share.rows(kind)
    whole = share.q + share.kv
    parts = {
        INPUT: n * share.width * ITEMSIZE,
        "norm output": n * share.width * ITEMSIZE,
        "q, k, v": rows * (whole if kind == "lighthouse" else whole + share.q + share.kv // 2) * ITEMSIZE,
        "log-sum-exp": 4 * rows * share.heads,
        "attention output": n * share.q * ITEMSIZE,
    }
    if kind == "lighthouse":
        parts |= {
            "attention output of the rows": rows * share.q * ITEMSIZE,
            "selected rows": 4 * share.kv_heads * rows,
            "inverse map": 4 * share.kv_heads * _pyramid(share),
        }
    return parts


def _saved_by_feed_forward(share: Share) -> Parts:
    n = share.tokens
    return {
        "input of the feed-forward": n * share.width * ITEMSIZE,
        "its norm output": n * share.width * ITEMSIZE,
        "gate and up": 2 * n * share.ffn * ITEMSIZE,
        PRODUCT: n * share.ffn * ITEMSIZE,
    }


def _pyramid(share: Share) -> int:
    """Entries of all levels over this rank's tokens: n (1 + 1/p + ... + 1/p^(L-1))."""
    assert share.attention is not None
    return sum(share.tokens // share.attention.pooling_factor**level for level in range(share.attention.num_levels))


@cache
def _largest_moment(share: Share, layer: Layer) -> tuple[str, Parts]:
    """Of one layer: when it needs most, and everything of it that is there then, what it keeps included."""
    return max(moments(share, layer).items(), key=lambda item: sum(item[1].values()))


def moments(share: Share, layer: Layer) -> dict[str, Parts]:
    """Everything of a layer that is there at once, by moment.

    Backward of a `selective` layer computes what the feed-forward needs from the kept attention output, and only then
    q, k and v; of a `full` one attention comes first, and what it makes stays.
    """
    attention, feed_forward = _saved_by_attention(share, layer.kind), _saved_by_feed_forward(share)
    n, rows, kind = share.tokens, share.rows(layer.kind), layer.kind
    out, whole = n * share.width * ITEMSIZE, share.q + share.kv
    attended = {ATTENDED: _kept_of_attention(share, layer)}
    forward = feed_forward | attended | {INPUT: out, "output": out}
    if layer.recompute == "none":
        forward = feed_forward | attention | {"output": out}
    del feed_forward[PRODUCT]  # its part in a gradient comes first
    if layer.recompute == "selective":
        feed_forward |= attended | {INPUT: out, "attention output": n * share.q * ITEMSIZE}
    else:
        feed_forward |= attention
    in_feed_forward = {
        "gradient of the output": out,
        "gradient of gate and up": 2 * n * share.ffn * ITEMSIZE,
        f"gradient of {PRODUCT}": n * share.ffn * ITEMSIZE,
    }
    in_attention = {
        "gradient of the output": out,
        "float32 sum of the gradient of q": 4 * rows * share.q,  # cuDNN's; seen in the peak of benchmarks.latency
        "buffers of the exchange": exchange_buffers(share, kind),
    }
    if kind == "lighthouse":
        in_attention |= {
            "gradients of the gathered q, k, v and output": rows * (whole + share.q) * ITEMSIZE,
            "gradients of q, k, v, and joined": 2 * n * whole * ITEMSIZE,
        }
    else:
        in_attention["gradients of the attention output, q, k, v"] = n * (whole + share.q) * ITEMSIZE
    return {
        "forward": forward,
        "feed-forward backward": feed_forward | in_feed_forward,
        "attention backward": attention | in_attention,
    }


def exchange_buffers(share: Share, kind: StageMode) -> int:
    """Of one attention, in backward, where there are more (docs/context-parallel.md)."""
    if share.cp == 1:
        return 0
    kv = share.rows(kind) * share.kv
    if share.exchange == "allgather":
        return share.cp * kv * (ITEMSIZE + 3 * 4)
    if share.exchange == "ulysses":
        return share.rows(kind) * (2 * share.q + share.kv) * ITEMSIZE
    if share.exchange == "ring_flash_attn":
        return kv * (2 * ITEMSIZE + 4 * 4)
    # Parts of dQ that wait to be added, most of two ranks each, until they begin a sum in float32.
    parts = min(share.cp, share.cp // 2 + 2, RING_PARTS)
    dq = share.rows(kind) * share.q * (parts * ITEMSIZE + (4 if share.cp >= RING_PARTS else 0))
    joined = 2 * ITEMSIZE if share.sequences > 1 and share.cp > 2 else 0  # copies of the keys and values of two ranks
    return dq + kv * (min(3 * (share.cp + 1) * ITEMSIZE // 2, (share.cp + 3) * ITEMSIZE, 13 * ITEMSIZE + 4) + joined)


@cache
def loss(share: Share) -> Parts:
    """Of the chunked loss, which computes its gradients in forward."""
    rows = min(LOSS_ROWS, share.tokens)
    logits, head = rows * share.vocabulary * ITEMSIZE, 4 * share.vocabulary * share.width
    row = share.tokens * share.width * ITEMSIZE
    return {
        "last hidden states, before and after the norm": 2 * row,
        "their gradient": row,
        "logits of a chunk and their gradient": 2 * logits,
        "gradient of the head, float32": head,
    }


def _sum(parts: Iterable[Parts]) -> Parts:
    total: Parts = {}
    for one in parts:
        for name, size in one.items():
            total[name] = total.get(name, 0) + size
    return total
