"""What Lighthouse does around its attention call, stage by stage: milliseconds, and the bytes that a stage must move.

Floors count each input read once and each output written once, over the bandwidth of a large copy in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.common import Record, difference, timed
from benchmarks.layer import Attention, forward_backward, sdpa
from benchmarks.layer import measure as measure_layer
from lhcp.attention import Selection
from lhcp.kernels.lighthouse import PyramidShape, kernels_for, reference
from lhcp.kernels.lighthouse.tile import first_stored

COPIED = 2**30
"""Bytes of the copy whose bandwidth is the measure, on a GPU."""
FORWARD = ("pool and score", "select", "invert", "gather", "scatter back")
BACKWARD = ("scatter back, backward", "gather, backward")


def copy_bytes_per_ms(device: torch.device, repeats: int) -> float:
    """Bytes read and written in a millisecond by a large copy."""
    source = torch.ones(COPIED if device.type == "cuda" else COPIED // 16, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), device, repeats)["p50_ms"]


def around(sparse: Attention, inputs: Sequence[Tensor], selection: Selection, repeats: int) -> Record:
    """Dense attention on the gathered rows alone, and what Lighthouse takes besides, measured turn by turn.

    Args:
        sparse: Lighthouse attention.
        inputs: q, k, v and the gradient of the output.
        selection: of the whole sequence.
        repeats: pairs of calls that are timed.

    Returns:
        `dense_on_subsequence` and `around`: percentiles of `forward` and `forward_backward`.
    """
    q, k, v, grad = inputs
    shape, (rows, inverse) = selection.pyramid, selection.index()
    with torch.no_grad():
        kernels = kernels_for(q)
        pooled, _ = kernels.pool(q, k, v, shape, scores=False)
        sub = [*kernels.gather((q, k, v), pooled, rows, inverse, shape), grad[:, : rows.shape[-1]].clone()]
        del pooled

    @torch.no_grad()
    def forward(attention: Attention, tensors: Sequence[Tensor]) -> Tensor:
        return attention(*tensors[:3])

    device = q.device
    calls = {"forward": forward, "forward_backward": forward_backward}
    return {
        "dense_on_subsequence": measure_layer(sdpa, sub, repeats),
        "around": {
            kind: difference(lambda: run(sparse, inputs), lambda: run(sdpa, sub), device, repeats)  # noqa: B023
            for kind, run in calls.items()
        },
    }


def measure(inputs: Sequence[Tensor], selection: Selection, bytes_per_ms: float, repeats: int) -> Record:
    """Each stage alone, at one selection.

    Args:
        inputs: q, k, v and the gradient of the output.
        selection: of the whole sequence.
        bytes_per_ms: the bandwidth that floors are reckoned with.
        repeats: calls that are timed.

    Returns:
        By stage: percentiles in milliseconds, `bytes` and `floor_ms`.
    """
    q, k, v, grad = inputs
    config, shape, kernels = selection.config, selection.pyramid, kernels_for(q)
    rows, inverse = selection.index()
    strata, budget, cover = config.strata, config.topk // config.strata, config.cover_prefix
    pooled, bits = kernels.pool(q, k, v, shape, scores=True)
    assert bits is not None
    qkv = (q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_())
    subs = kernels.gather(qkv, kernels.pool(*qkv, shape, scores=False)[0], rows, inverse, shape)
    sub = subs[0].detach().requires_grad_()
    out = kernels.scatter_back(sub, rows, inverse, shape, 1, None)
    calls: dict[str, Callable[[], object]] = {
        "pool and score": lambda: kernels.pool(q, k, v, shape, scores=True),
        "select": lambda: kernels.select(*bits, shape, strata, budget, cover),
        "invert": lambda: reference.invert(rows, shape.offsets[-1]),
        "gather": lambda: kernels.gather((q, k, v), pooled, rows, inverse, shape),
        "scatter back": lambda: kernels.scatter_back(sub.detach(), rows, inverse, shape, 1, None),
        "scatter back, backward": lambda: torch.autograd.grad(out, sub, grad, retain_graph=True),
        "gather, backward": lambda: torch.autograd.grad(subs, qkv, [x.detach() for x in subs], retain_graph=True),
    }
    moved = stage_bytes(shape, config.topk, rows.shape[-1], (q, k, v))
    return {
        name: timed(call, q.device, repeats, queued=True)
        | {"bytes": moved[name], "floor_ms": moved[name] / bytes_per_ms}
        for name, call in calls.items()
    }


def least_bytes(shape: PyramidShape, slots: int, qkv: Sequence[Tensor]) -> dict[str, int]:
    """The bytes around attention that no division of the work avoids.

    Forward: q, k and v are read, the sub-sequence written, its output read and the whole output written. Backward
    likewise, the other way round.
    """
    forward = sum(_row_bytes(qkv)) * (shape.length + slots)
    return {"forward": forward, "forward_backward": 2 * forward}


def _row_bytes(qkv: Sequence[Tensor]) -> tuple[int, int]:
    """Bytes of a token's row of q, and of those of q, k and v, over the batch."""
    query, key, value = (x[0, 0].nbytes * x.shape[0] for x in qkv)
    return query, query + key + value


def stage_bytes(shape: PyramidShape, topk: int, slots: int, qkv: Sequence[Tensor]) -> dict[str, int]:
    """The bytes that each stage must move, as the kernels divide the work.

    Args:
        shape: the pyramid over N tokens.
        topk: k.
        slots: S.
        qkv: q, k and v.
    """
    tokens, p, levels = shape.length, shape.pooling_factor, shape.num_levels
    batch, groups = qkv[0].shape[0], qkv[1].shape[2]
    query_row, all_rows = _row_bytes(qkv)
    stored = sum(shape.sizes[first_stored(levels) :])
    word = 4 * batch * groups
    scores, index = word * 2 * sum(shape.sizes[1:]), word * slots
    inverse = word * shape.offsets[-1]
    # Rows that a gather reads: the coarsest level, the candidates of the other stored ones, and, under those of
    # level 1, the tokens, of which some are gathered themselves.
    read = shape.sizes[-1] + (levels - 1 - first_stored(levels)) * p * topk
    read += min(tokens, (p if levels == 2 else p * p) * topk)
    return {
        "pool and score": (tokens + stored) * all_rows + scores,
        "select": scores + index,
        "invert": index + inverse,
        "gather": (read + slots) * all_rows + index,
        "scatter back": (slots + tokens) * query_row + inverse,
        "scatter back, backward": (tokens + stored + read + slots) * query_row + index,
        "gather, backward": (slots + tokens) * all_rows + inverse,
    }
