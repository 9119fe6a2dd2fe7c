"""The exchange `ring_flash_attn`: the package's own zigzag ring, forward and backward, over real processes.

The kernel itself untested until it runs on GPUs: flash-attn needs one, so a stand-in with its signatures takes its
place here, over PyTorch's attention for CPUs. All else is the installed package.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from lhcp import train
from lhcp.attention import LighthouseConfig, lighthouse_attention, select
from lhcp.attention.scoring import dilated_rows
from lhcp.attention.selection import Selection, select_from_scores
from lhcp.config import ConfigError
from lhcp.distributed import ContextParallel
from lhcp.distributed.exchange.block import CpuBackend
from lhcp.distributed.exchange.ring_flash_attn import PackageExchange, load_package
from lhcp.distributed.sharding import ChunkLayout
from lhcp.volume import Attention, exchange_bytes, scorer_bytes
from ranks import run_ranks
from runs import write_data

# Zigzag over 4 ranks: 8 chunks, each a stratum of 90 tokens. flash-attn takes head widths that are multiples of 8.
BATCH, SEQ_LEN, HEADS, WIDTH = 2, 720, 4, 24
SHAPE = {"num_levels": 3, "pooling_factor": 3, "topk": 40, "num_strata": 8}
NORM = LighthouseConfig(**SHAPE)
CONFIGS = {
    "dense": None,
    "fixed": NORM,
    "norm": NORM,
    "dilated": LighthouseConfig(**SHAPE, scorer="dilated", dilation=5),
}
WORLDS, KV_HEADS = [2, 4], [4, 1]
KINDS = pytest.mark.parametrize("kind", CONFIGS)
EVERY_DEGREE = pytest.mark.parametrize("world", WORLDS)
EVERY_SHARING = pytest.mark.parametrize("kv_heads", KV_HEADS)


# The kernel's two functions, as flash-attn 2.7 and 2.8 declare them: the package calls them by these names.
def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    window = (window_size_left, window_size_right)
    check_plain(q, k, v, softmax_scale, causal, dropout_p, window, softcap, alibi_slopes)
    assert not return_softmax
    out, lse = CpuBackend().forward(q, k, v, causal)
    return out.contiguous(), lse.contiguous(), q.new_empty(0), torch.empty(2, dtype=torch.int64)


def flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    window = (window_size_left, window_size_right)
    check_plain(q, k, v, softmax_scale, causal, dropout_p, window, softcap, alibi_slopes)
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    assert dout.shape == out.shape == q.shape
    assert softmax_lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert softmax_lse.is_contiguous()  # the kernel asks for no strides of it
    gradients = CpuBackend().backward(dout, q, k, v, out, softmax_lse, causal)
    for target, gradient in zip((dq, dk, dv), gradients, strict=True):
        assert target is not None
        assert (target.shape, target.dtype, target.stride(-1)) == (gradient.shape, q.dtype, 1)
        target.copy_(gradient)
    return softmax_lse.clone()


def check_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    dropout_p: float,
    window: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
) -> None:
    """The stand-in computes nothing but scaled attention, causal among the same tokens."""
    assert q.dtype == k.dtype == v.dtype
    assert softmax_scale == 1 / math.sqrt(q.shape[-1])
    assert not causal or q.shape[1] == k.shape[1]
    assert (dropout_p, window, softcap, alibi_slopes) == (0, (-1, -1), 0, None)


# As flash-attn 2.6 declares them: no torch ops, a window in one argument, and eight outputs.
def flash_forward_2_6(
    q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax
) -> tuple[Tensor, ...]:
    out, lse, mask, state = flash_forward(
        q, k, v, dropout_p, softmax_scale, causal, *window_size, softcap, alibi_slopes, return_softmax
    )
    return out, q, k, v, out, lse, mask, state


def flash_backward_2_6(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
    deterministic, rng_state=None,
) -> tuple[Tensor, ...]:  # fmt: skip
    softmax_d = flash_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, *window_size, softcap,
        alibi_slopes, deterministic, rng_state,
    )  # fmt: skip
    return dq, dk, dv, softmax_d


def absent(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("the stand-in has no sequences of several lengths")


def install_flash_attn() -> None:
    """A module `flash_attn`, for this process: call it in a forked rank alone, or transformers would find it."""

    def op(name: str, function: Callable[..., Any], mutates: tuple[str, ...]) -> Any:
        return torch.library.custom_op(f"flash_attn::{name}", function, mutates_args=mutates, device_types="cpu")

    package, interface = (ModuleType(name) for name in ("flash_attn", "flash_attn.flash_attn_interface"))
    for module, is_package in ((package, True), (interface, False)):
        module.__spec__ = ModuleSpec(module.__name__, None, is_package=is_package)  # find_spec asks for it
        sys.modules[module.__name__] = module
    vars(package).update(__path__=[], __version__="2.8.3", flash_attn_interface=interface)
    vars(interface).update(
        _flash_attn_forward=op("_flash_attn_forward", flash_forward, ()),
        _flash_attn_backward=op("_flash_attn_backward", flash_backward, ("dq", "dk", "dv")),
        _flash_attn_varlen_forward=absent,
        _flash_attn_varlen_backward=absent,
    )


@dataclass(frozen=True)
class Result:
    """What one process, or all ranks together, make of whole sequences; and what this rank sent for it."""

    entries: Tensor | None
    out_and_grads: tuple[Tensor, ...]
    sent: tuple[int, int]


def inputs(kv_heads: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output, rounded to bfloat16 first."""
    generator = torch.Generator().manual_seed(kv_heads)
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    return tuple(torch.randn(BATCH, SEQ_LEN, h, WIDTH, generator=generator).bfloat16().to(dtype) for h in heads)


def fixed_selection(kv_heads: int) -> Selection:
    """Of random scores: another one than q and k would make."""
    scores = torch.rand(2, BATCH, kv_heads, SEQ_LEN, generator=torch.Generator().manual_seed(9))
    return select_from_scores(*scores, NORM)


def attend(kind: str, cp: ContextParallel, tensors: tuple[Tensor, ...], selection: Selection | None = None) -> Result:
    """Forward and backward of this rank's shard of `tensors`, with the whole sequences' `selection` or its own."""
    config = CONFIGS[kind]
    *qkv, grad = (cp.shard(x) for x in tensors)
    qkv = [x.clone().requires_grad_() for x in qkv]
    mine = None if selection is None else cp.shard(selection)
    with sends() as forward:
        if config is None:
            out = cp.attend(*qkv)
        else:
            out = lighthouse_attention(*qkv, config, selection=mine, context_parallel=cp)
    with sends() as backward:
        out.backward(grad)
    if config is not None and selection is None:
        selection = cp.unshard(select(qkv[0], qkv[1], config, v=qkv[2], context_parallel=cp))
    whole = tuple(cp.unshard(x) for x in (out.detach(), *(x.grad for x in qkv)))
    return Result(None if selection is None else selection.entries, whole, (sum(forward), sum(backward)))


@contextmanager
def sends() -> Iterator[list[int]]:
    """Bytes of each tensor that this rank sends to one other in the body."""
    found: list[int] = []
    start = dist.batch_isend_irecv

    def counted(ops: list[dist.P2POp]) -> list[dist.Work]:
        found.extend(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return start(ops)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", counted)
        yield found


if __name__ == "__main__":
    import transformers.modeling_utils

    def rank_main(rank):
        t = time.time()
        install_flash_attn()
        t0 = time.time()
        import ring_flash_attn

        t1 = time.time()
        torch.use_deterministic_algorithms(True)
        cp = ContextParallel(dist.group.WORLD, "zigzag", "ring_flash_attn")
        r = {}
        ts = [t0 - t, t1 - t0]
        for kind in CONFIGS:
            for g in KV_HEADS:
                t = time.time()
                r[kind, g] = attend(kind, cp, inputs(g), fixed_selection(g) if kind == "fixed" else None)
                ts.append(time.time() - t)
        return r, ts

    torch.set_num_threads(1)
    for w in (2, 4):
        t = time.time()
        x = run_ranks(w, rank_main)
        print(w, time.time() - t, x[0][1])
        rs = x[0][0]
        for (kind, g), res in rs.items():
            tt = time.time()
            one = attend(kind, ContextParallel(), inputs(g), fixed_selection(g) if kind == "fixed" else None)
            t2 = time.time()

            def exact(res):
                sel = None if res.entries is None else Selection(res.entries, CONFIGS[kind].resolve(SEQ_LEN), SEQ_LEN)
                return attend(kind, ContextParallel(), inputs(g, torch.float64), sel)

            e = exact(res)
            e1 = exact(one)
            t3 = time.time()
            err = lambda a, b: float((a - b).norm() / b.norm())
            print(
                w,
                kind,
                g,
                [
                    f"{err(a, b):.2e}/{err(c, d):.2e}={err(a, b) / err(c, d):.2f}"
                    for a, b, c, d in zip(res.out_and_grads, e.out_and_grads, one.out_and_grads, e1.out_and_grads)
                ],
                None if res.entries is None else float((res.entries != one.entries).float().mean()),
                res.sent,
                f"{t2 - tt:.2f} {t3 - t2:.2f}",
            )
