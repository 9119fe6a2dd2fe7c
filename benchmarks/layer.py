"""One attention layer, Lighthouse and dense: random inputs, what is timed, and whether it is right.

B = 1; N tokens, W ranks that share them, H query heads, G KV heads, D their width.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.common import Record, largest_over_ranks, peak_memory_gib, reset_peak_memory, timed
from lhcp.attention import Selection, lighthouse_attention, select
from lhcp.config import BlockBackendName, LighthouseConfig, RunConfig
from lhcp.distributed import ContextParallel
from lhcp.kernels.lighthouse import Kernels, PyramidShape, kernels_for, reference

TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2}
"""Largest relative norm of an error of one process, by dtype."""
ROUNDING = 2.0
"""Largest error over ranks, in that of one process of the same dtype."""
DILATED_TOLERANCE = {"float64": 0.0, "float32": 1e-2, "bfloat16": 1e-1}
"""Largest share of entries that only one of two selections by the scorer `dilated` has, by dtype: its scores meet in
an exchange, so rounding flips near-ties, of which eight bits make many. Those of `norm` are the same bit for bit."""
ROUNDED_SCORES = 1e-2
"""As `DILATED_TOLERANCE`, of `norm` against scores in float64: a near-tie in a thousand tokens."""
SCORE_TOLERANCE = 1e-5
"""Largest relative error of a score against plain PyTorch's: both are rounded sums of squares in float32."""
SHORT = 2048
"""Tokens that the check is about as long as: a reference in float64 holds N x N scores of every head."""

_EXACT = threading.Lock()
"""Ranks that are threads of one GPU take turns with what needs most memory."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """The tensors of one attention layer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    device: torch.device

    @classmethod
    def of(cls, config: RunConfig, device: torch.device) -> Layer:
        """A layer of the run's model, on `device`."""
        model = config.model
        return cls(model.num_heads, model.num_kv_heads, model.head_dim, config.activation_dtype, device)

    def inputs(self, length: int, seed: int, device: torch.device | None = None) -> list[Tensor]:
        """Random normal q, k, v and gradient of the output: [1, length, H or G, D] in the layer's dtype.

        Args:
            length: tokens.
            seed: of the numbers.
            device: where they are drawn; None: the layer's own. Only those of a CPU are the same everywhere.
        """
        drawn_on, dtype = device or self.device, getattr(torch, self.dtype)
        generator = torch.Generator(drawn_on).manual_seed(seed)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        shapes = [(1, length, h, self.head_dim) for h in heads]
        return [torch.randn(s, generator=generator, device=drawn_on, dtype=dtype).to(self.device) for s in shapes]


KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Of dense attention, the fastest first."""


def sdpa(q_BNHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor) -> Tensor:
    """Dense causal attention by PyTorch's own call, with the fastest kernel that takes the tensors."""
    q, k, v = (x.transpose(1, 2) for x in (q_BNHD, k_BNGD, v_BNGD))
    with sdpa_kernel(KERNELS, set_priority=True):
        out: Tensor = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def sdpa_kernel_of(layer: Layer) -> str:
    """Which of `KERNELS` takes the layer's tensors."""
    q, k, v = (x.transpose(1, 2) for x in layer.inputs(256, seed=0)[:3])
    for kernel in KERNELS:
        with suppress(RuntimeError), warnings.catch_warnings(action="ignore"), sdpa_kernel(kernel):
            scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            return kernel.name.lower()
    raise AssertionError("plain products take everything")


def lighthouse(config: LighthouseConfig, cp: ContextParallel, selection: Selection | None = None) -> Attention:
    """Lighthouse attention; it selects too, unless it is given what to use."""
    return partial(lighthouse_attention, cfg=config, selection=selection, context_parallel=cp)


def forward_backward(attention: Attention, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Output and gradients of q, k and v, by name."""
    *qkv, grad = (x.detach() for x in inputs)
    leaves = [x.requires_grad_() for x in qkv]
    out = attention(*leaves)
    gradients = torch.autograd.grad(out, leaves, grad)
    return {"out": out.detach()} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))


def measure(attention: Attention, inputs: Sequence[Tensor], repeats: int) -> Record:
    """Times and peak memory (collective where there are ranks)."""
    device = inputs[0].device
    reset_peak_memory(device)

    @torch.no_grad()
    def forward() -> Tensor:
        return attention(*inputs[:3])

    return {
        "forward": timed(forward, device, repeats),
        "forward_backward": timed(lambda: forward_backward(attention, inputs), device, repeats),
        "peak_memory_gib": peak_memory_gib(device),
    }


def ratio(dense: Record, sparse: Record) -> dict[str, float]:
    """How many times as long dense attention takes, by medians."""
    return {kind: dense[kind]["p50_ms"] / sparse[kind]["p50_ms"] for kind in ("forward", "forward_backward")}


def shortened(config: LighthouseConfig, seq_len: int, num_chunks: int) -> tuple[int, LighthouseConfig]:
    """A length of about `SHORT` tokens, at most `seq_len`, and `config` in proportion: same pyramid, smaller strata.

    Args:
        config: resolved for `seq_len` and `num_chunks`.
        seq_len: N.
        num_chunks: of the context-parallel layout.
    """
    if seq_len <= SHORT:
        return seq_len, config
    per_chunk = min(2, config.strata // num_chunks)
    strata, window = num_chunks * per_chunk, config.coarsest_window
    # A chunk is a multiple of the dilation.
    unit = config.dilation // math.gcd(window * per_chunk, config.dilation) if config.scorer == "dilated" else 1
    entries = max(1, max(4, SHORT // (strata * window)) // unit) * unit
    share = config.topk * window / seq_len
    budget = min(entries, max(2, round(entries * share)))
    length = strata * window * entries
    if length >= seq_len:
        return seq_len, config
    return length, config.model_copy(update={"topk": strata * budget, "num_strata": strata}).resolve(length, num_chunks)


def check(
    layer: Layer,
    length: int,
    config: LighthouseConfig,
    cp: ContextParallel,
    dense: Attention,
    backend: BlockBackendName,
) -> Record:
    """Compare output and gradients with those of one process that attends alone (collective).

    That process computes in float64 with plain products. What several ranks may err is in proportion to what one
    process errs that computes in the layer's dtype with the same kernel: rounding, and nothing else. Selections are
    compared on their own, those of several ranks with that process's, and then held fixed: else a flipped near-tie
    would count twice.

    Args:
        layer: the layer.
        length: tokens, legal for `config`.
        config: resolved.
        cp: the ranks that share the sequence.
        dense: dense attention over their shards.
        backend: of the one process that computes in the layer's dtype.

    Returns:
        `passed`, and all that was compared; an error is a relative norm, that of the worst rank. Over several ranks
        `alone`, too: errors of the one process.
    """
    whole = layer.inputs(length, seed=0, device=torch.device("cpu"))
    shards = [cp.shard(x) for x in whole]
    one, exact_one = ContextParallel(block_backend=backend), ContextParallel(block_backend="math")
    exact = [x.double() for x in whole]

    q, k, v, _ = whole
    selection = select(q, k, config, v=v, context_parallel=one)
    own = select(shards[0], shards[1], config, v=shards[2], context_parallel=cp)
    # Of one process alone: by scores in float64.
    q, k, v, _ = exact
    expected_selection = selection if cp.size > 1 else select(q, k, config, v=v, context_parallel=exact_one)
    share = _differing(own, cp.shard(expected_selection))
    errors, alone = {"selection": largest_over_ranks(share, layer.device)}, Record()
    kinds = {
        "lighthouse": (
            lighthouse(config, cp, cp.shard(selection)),
            lighthouse(config, one, selection),
            lighthouse(config, exact_one, selection),
        ),
        "dense": (dense, one.attend, exact_one.attend),
    }
    for name, (attention, of_one, exact_attention) in kinds.items():
        with _EXACT:
            expected = {part: cp.shard(x) for part, x in forward_backward(exact_attention, exact).items()}
        for part, value in forward_backward(attention, shards).items():
            errors[f"{name} {part}"] = largest_over_ranks(_relative(value, expected[part]), layer.device)
        if cp.size > 1:
            for part, value in forward_backward(of_one, whole).items():
                error = _relative(cp.shard(value), expected[part])
                alone[f"{name} {part}"] = largest_over_ranks(error, layer.device)

    of = {"length": length, "attention": config.model_dump(mode="json"), "against": "one process in float64"}
    return of | _verdict(layer.dtype, config.scorer, errors, alone)


def worst(layer: Layer, checks: Sequence[Record]) -> Record:
    """What several ranks found each for itself, as one."""
    errors, alone = (
        {name: max(found[part][name] for found in checks) for name in checks[0][part]} for part in ("errors", "alone")
    )
    return {**checks[0], **_verdict(layer.dtype, checks[0]["attention"]["scorer"], errors, alone)}


def _verdict(dtype: str, scorer: str, errors: Record, alone: Record) -> Record:
    tolerances = dict.fromkeys(errors, TOLERANCE[dtype])
    if dtype != "float64":  # in which the one process has no error to compare with
        tolerances |= {name: ROUNDING * min(error, TOLERANCE[dtype]) for name, error in alone.items()}
    of_norm = 0.0 if alone else ROUNDED_SCORES
    tolerances["selection"] = DILATED_TOLERANCE[dtype] if scorer == "dilated" else of_norm
    passed = all(errors[name] <= tolerances[name] for name in errors)
    return {"passed": passed, "errors": errors, "alone": alone, "tolerances": tolerances}


def check_kernels(inputs: Sequence[Tensor], config: LighthouseConfig, backend: BlockBackendName) -> Record:
    """Compare the kernels with plain PyTorch at full length: scores, the selection of the same scores, bit for bit, and
    the output, in the layer's dtype. Gradients need more memory than there is at the longest: `check` has them.

    Args:
        inputs: q, k, v and the gradient of the output.
        config: resolved.
        backend: of the attention call.

    Returns:
        As `check`.
    """
    q, k, v = inputs[:3]
    kernels, cp = kernels_for(q), ContextParallel(block_backend=backend)
    sel = select(q, k, config, v=v)
    shape, (rows, inverse) = sel.pyramid, sel.index()
    with torch.no_grad():
        bits = (kernels.score(q, k.shape[2], shape), kernels.score(k, k.shape[2], shape))
        error = max(_score_error(kernels, x, k.shape[2], shape) for x in (q, k))
        budget = config.topk // config.strata
        mine, other = (
            path.select(*bits, shape, config.strata, budget, config.cover_prefix) for path in (kernels, reference)
        )
        differing = (mine != other).float().mean()
        # One after the other: a pyramid in float32 takes several times its tensor.
        sub = [reference.take_rows(reference.pyramid_rows(x, shape), rows) for x in (q, k, v)]
        plain = reference.scatter_back(cp.attend(*sub), rows, inverse, shape, 1, None)
        out_error = _relative_in_parts(lighthouse_attention(q, k, v, config, selection=sel, context_parallel=cp), plain)
    errors = {"scores": error, "selection": float(differing), "lighthouse out": out_error}
    of_out = TOLERANCE[str(q.dtype).removeprefix("torch.")]
    tolerances = {"scores": SCORE_TOLERANCE, "selection": 0.0, "lighthouse out": of_out}
    return {
        "passed": all(errors[name] <= tolerances[name] for name in errors),
        "length": q.shape[1],
        "against": "plain PyTorch",
        "errors": errors,
        "tolerances": tolerances,
    }


def _score_error(kernels: Kernels, x: Tensor, num_kv_heads: int, shape: PyramidShape) -> float:
    mine, other = (path.score(x, num_kv_heads, shape).view(torch.float32) for path in (kernels, reference))
    return float(((mine - other).abs() / other).max())


def complaint(outcome: Mapping[str, Any]) -> str:
    """What a failed check says, in words: all that is wrong, and by how much."""
    errors, tolerances = outcome["errors"], outcome["tolerances"]
    wrong = {name: error for name, error in errors.items() if error is None or not error <= tolerances[name]}
    # null in a file is a number that was not finite.
    said = (
        f"{name} {'inf' if e is None else f'{e:.2g}'} (at most {tolerances[name]:.3g})" for name, e in wrong.items()
    )
    return f"check failed against {outcome['against']}, N = {outcome['length']:,}: {', '.join(said)}"


def _differing(one: Selection, other: Selection) -> float:
    """Share of `one`'s entries that `other` has not."""
    heads = zip(one.entries.flatten(0, 1), other.entries.flatten(0, 1), strict=True)
    missing = sum(int(torch.isin(mine, theirs, invert=True).sum()) for mine, theirs in heads)
    return missing / one.entries.numel()


def _relative_in_parts(value: Tensor, expected: Tensor) -> float:
    """As `_relative`, without a whole copy in float64."""
    parts = list(zip(value.split(2**16, dim=1), expected.split(2**16, dim=1), strict=True))
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in parts)
    return math.sqrt(difference / sum(float(b.double().square().sum()) for _, b in parts))


def _relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())
