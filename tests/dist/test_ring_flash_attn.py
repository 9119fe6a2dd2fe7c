"""The exchange `ring_flash_attn`: the package's own zigzag ring, forward and backward, over real processes.

The kernel itself untested until it runs on GPUs: flash-attn needs one, so a stand-in with its signatures takes its
place here, over PyTorch's attention for CPUs. All else is the installed package.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
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
from runs import make_config, make_trainer, write_data

# Zigzag over 4 ranks: 8 chunks, each a stratum of 90 tokens. flash-attn takes head widths that are multiples of 8.
BATCH, SEQ_LEN, HEADS, WIDTH = 2, 720, 4, 24
SHAPE = {"num_levels": 3, "pooling_factor": 3, "topk": 40, "num_strata": 8}
NORM = LighthouseConfig(**SHAPE)
DILATED = LighthouseConfig(**SHAPE, scorer="dilated", dilation=5)
CONFIGS = {"dense": None, "fixed": NORM, "norm": NORM, "dilated": DILATED}
KV_HEADS = [4, 1]


# The kernel's two functions, as flash-attn 2.7 and 2.8 declare them: the package calls them by these names.
def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    features = (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax)
    check_plain(q, k, v, softmax_scale, causal, features)
    out, lse = CpuBackend().forward(q, k, v, causal)
    return out.contiguous(), lse.contiguous(), q.new_empty(0), torch.empty(2, dtype=torch.int64)


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:  # fmt: skip
    features = (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes, False)
    check_plain(q, k, v, softmax_scale, causal, features)
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


# As flash-attn 2.6 declares them: no torch ops, a window in one argument, and eight outputs.
def flash_forward_2_6(
    q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_softmax
) -> tuple[Tensor, ...]:
    features = (dropout_p, softmax_scale, causal, *window_size, softcap, alibi_slopes)
    out, *others = flash_forward(q, k, v, *features, return_softmax)
    return out, q, k, v, out, *others


def flash_backward_2_6(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
    deterministic, rng_state=None,
) -> tuple[Tensor, ...]:  # fmt: skip
    features = (dropout_p, softmax_scale, causal, *window_size, softcap, alibi_slopes)
    return dq, dk, dv, flash_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, *features, deterministic)


def check_plain(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, features: tuple[Any, ...]) -> None:
    """The stand-in computes nothing but scaled attention, causal among the same tokens."""
    assert q.dtype == k.dtype == v.dtype
    assert math.isclose(softmax_scale, q.shape[-1] ** -0.5)
    assert not causal or q.shape[1] == k.shape[1]
    assert features == (0, -1, -1, 0, None, False)


def install_flash_attn() -> None:
    """A module `flash_attn` in this process, a forked rank: in others, transformers would find it."""
    assert multiprocessing.parent_process() is not None

    def op(name: str, function: Callable[..., Any], mutates: tuple[str, ...]) -> Any:
        return torch.library.custom_op(f"flash_attn::{name}", function, mutates_args=mutates, device_types="cpu")

    interface = ModuleType("flash_attn.flash_attn_interface")
    vars(interface).update(
        _flash_attn_forward=op("_flash_attn_forward", flash_forward, ()),
        _flash_attn_backward=op("_flash_attn_backward", flash_backward, ("dq", "dk", "dv")),
        _flash_attn_varlen_forward=Mock(side_effect=AssertionError),
        _flash_attn_varlen_backward=Mock(side_effect=AssertionError),
    )
    for module in (ModuleType("flash_attn"), interface):
        module.__spec__ = ModuleSpec(module.__name__, None)  # find_spec asks for it
        sys.modules[module.__name__] = module


@dataclass(frozen=True)
class Result:
    """Of whole sequences: output, gradients of q, k and v, rows that `dilated` scores; bytes that this rank sent."""

    entries: Tensor | None
    values: list[Tensor]
    sent: tuple[int, int]


def inputs(kv_heads: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output, rounded to bfloat16 first."""
    generator = torch.Generator().manual_seed(kv_heads)
    heads = (HEADS, kv_heads, kv_heads, HEADS)
    return tuple(torch.randn(BATCH, SEQ_LEN, h, WIDTH, generator=generator).bfloat16().to(dtype) for h in heads)


def given_selection(kind: str, kv_heads: int) -> Selection | None:
    """Of random scores, where it is fixed: another one than q and k would make."""
    if kind != "fixed":
        return None
    scores = torch.rand(2, BATCH, kv_heads, SEQ_LEN, generator=torch.Generator().manual_seed(9))
    return select_from_scores(*scores, NORM)


def attend(kind: str, cp: ContextParallel, tensors: tuple[Tensor, ...], selection: Selection | None = None) -> Result:
    """Forward and backward of this rank's shard of `tensors`, with the whole sequences' `selection` or its own."""
    config = CONFIGS[kind]
    *qkv, grad = (cp.shard(x) for x in tensors)
    qkv = [x.clone().requires_grad_() for x in qkv]
    mine = None if selection is None else cp.shard(selection)
    sparse = partial(lighthouse_attention, cfg=config, selection=mine, context_parallel=cp)
    with sends() as forward:
        out = cp.attend(*qkv) if config is None else sparse(*qkv)
    with sends() as backward:
        out.backward(grad)
    if config is not None and selection is None:
        selection = cp.unshard(select(qkv[0], qkv[1], config, v=qkv[2], context_parallel=cp))
    rows = dilated_rows(*qkv, config.dilation, cp) if kind == "dilated" else ()
    values = [cp.unshard(x) for x in (out.detach(), *(x.grad for x in qkv), *rows)]
    return Result(None if selection is None else selection.entries, values, (sum(forward), sum(backward)))


@contextmanager
def sends() -> Iterator[list[int]]:
    """Bytes of each tensor that this rank sends to another while the body runs; collectives apart."""
    found: list[int] = []
    start = dist.batch_isend_irecv

    def counted(ops: list[dist.P2POp]) -> list[dist.Work]:
        found.extend(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return start(ops)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", counted)
        yield found


def run_with_flash_attn(world: int, function: Callable[[int], Any]) -> list[Any]:
    """`run_ranks` where flash-attn is a stand-in and torch.empty is filled with NaN."""
    importlib.import_module("transformers.modeling_utils")  # the package does: once here, not in every forked process

    def rank_main(rank: int) -> Any:
        install_flash_attn()
        torch.use_deterministic_algorithms(True)
        return function(rank)

    return run_ranks(world, rank_main)


def package_ring(group: dist.ProcessGroup | None = None) -> ContextParallel:
    return ContextParallel(group or dist.group.WORLD, "zigzag", "ring_flash_attn")


@cache
def one_process(kind: str, kv_heads: int) -> Result:
    return attend(kind, ContextParallel(), inputs(kv_heads), given_selection(kind, kv_heads))


def errors(result: Result, kind: str, kv_heads: int) -> list[float]:
    """Against float64 at the result's own selection: what a score's rounding selects is no error of attention."""
    config = CONFIGS[kind]
    selection = None if config is None else Selection(result.entries, config.resolve(SEQ_LEN), SEQ_LEN)
    exact = attend(kind, ContextParallel(), inputs(kv_heads, torch.float64), selection)
    return [float((x - y).norm() / y.norm()) for x, y in zip(result.values, exact.values, strict=True)]


def check_as_exact_as_one_process(result: Result, kind: str, kv_heads: int) -> None:
    found, of_one = errors(result, kind, kv_heads), errors(one_process(kind, kv_heads), kind, kv_heads)
    assert all(x <= 1.5 * y for x, y in zip(found, of_one, strict=True)), (found, of_one)
    assert {x.dtype for x in result.values} == {torch.bfloat16}


@cache
def many_processes(world: int) -> list[dict[tuple[str, int], Result]]:
    """All cases at once, by rank: processes start slowly."""
    cases = [(kind, kv_heads) for kind in CONFIGS for kv_heads in KV_HEADS]

    def rank_main(rank: int) -> dict[tuple[str, int], Result]:
        cp = package_ring()
        return {case: attend(case[0], cp, inputs(case[1]), given_selection(*case)) for case in cases}

    return run_with_flash_attn(world, rank_main)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("kv_heads", KV_HEADS)
def test_every_degree_is_as_exact_as_one_process_and_sends_what_the_formula_says(
    world: int, kind: str, kv_heads: int
) -> None:
    """Against float64 of the same bfloat16 tensors, any value errs at most 1.5x as much as that of one process."""
    ranks = [results[kind, kv_heads] for results in many_processes(world)]
    check_as_exact_as_one_process(ranks[0], kind, kv_heads)

    config, length, scored = CONFIGS[kind], SEQ_LEN, 0
    of = Attention(HEADS, kv_heads, WIDTH, itemsize=2, batch=BATCH)
    if config is not None:
        length = config.subsequence_length(SEQ_LEN)
        scored = scorer_bytes("ring_flash_attn", config, world, 2, SEQ_LEN, of).forward
        differ = (ranks[0].entries != one_process(kind, kv_heads).entries).double().mean()
        assert differ <= (0.1 if kind == "dilated" else 0)  # its scores are rounded, and one entry shifts others
    expected = exchange_bytes("ring_flash_attn", world, 2, length, of)
    assert [rank.sent for rank in ranks] == [(expected.forward + scored, expected.backward)] * world


def test_groups_of_a_mesh_do_not_meet() -> None:
    """Two pairs of four ranks: the package is told ranks of the pair, and sends to those of the world."""

    def rank_main(rank: int) -> Result:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        tensors = inputs(1) if rank < 2 else tuple(-x for x in inputs(1))
        return attend("dense", package_ring(pairs[rank // 2]), tensors)

    first, _, second, _ = run_with_flash_attn(4, rank_main)
    check_as_exact_as_one_process(first, "dense", 1)
    assert all(torch.equal(a, -b) for a, b in zip(first.values, second.values, strict=True))


def test_strides_flags_and_older_kernels_change_nothing() -> None:
    """Heads before tokens and an expanded gradient; kernels that need not be deterministic; flash-attn 2.6."""

    def run(cp: ContextParallel, strided: bool = False) -> list[Tensor]:
        q, k, v, _ = (cp.shard(x) for x in inputs(2))
        if strided:
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        qkv = [x.detach().requires_grad_() for x in (q, k, v)]
        out = cp.attend(*qkv)
        grad = torch.ones(1, dtype=out.dtype).expand(out.shape)
        out.backward(grad if strided else grad.contiguous())
        return [out.detach(), *(x.grad for x in qkv)]

    def rank_main(rank: int) -> list[list[Tensor]]:
        cp = package_ring()
        found = [run(cp), run(cp, strided=True)]
        torch.use_deterministic_algorithms(False)
        found.append(run(cp))
        vars(load_package()).update(_flash_attn_forward=flash_forward_2_6, _flash_attn_backward=flash_backward_2_6)
        return [*found, run(cp)]

    for plain, *others in run_with_flash_attn(2, rank_main):
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_dtypes_are_refused_for_the_package_is_wrong_there(dtype: torch.dtype) -> None:
    """In float32 its sum of gradients is the very buffer that the next block overwrites; float64 is cut to float32."""

    def rank_main(rank: int) -> Result:
        cp, package = package_ring(), load_package()
        q, k, v, grad = (cp.shard(x) for x in inputs(4, dtype))
        with pytest.raises(ConfigError, match=f"takes bfloat16 or float16, not {dtype}; use 'ring'$"):
            cp.attend(q, k, v)
        torch.use_deterministic_algorithms(False)
        qkv = [x.requires_grad_() for x in (q, k, v)]
        out = package.zigzag_ring_flash_attn_func(*qkv, causal=True, group=dist.group.WORLD)
        out.backward(grad)
        return Result(None, [cp.unshard(x) for x in (out.detach(), *(x.grad for x in qkv))], (0, 0))

    # Those of k and v are sent from such buffers, and may be right where the sending is done in time.
    out, dq, *_ = errors(run_with_flash_attn(2, rank_main)[0], "dense", 4)
    assert out <= 1e-6
    assert dq >= (0.1 if dtype == torch.float32 else 1e-9)


def test_what_it_cannot_take_is_refused() -> None:
    contiguous = "^exchange 'ring_flash_attn' needs sharding 'zigzag', not 'contiguous'$"

    def rank_main(rank: int) -> None:
        with pytest.raises(ConfigError, match=contiguous):
            ContextParallel(dist.group.WORLD, "contiguous", "ring_flash_attn")
        with pytest.raises(ConfigError, match=r"^exchange 'ring_flash_attn' needs a process group$"):
            PackageExchange(None, ChunkLayout(2, "zigzag"))
        for width in (12, 264):
            with pytest.raises(ConfigError, match=f"head_dim that is a multiple of 8 and at most 256, not {width}; "):
                package_ring().attend(*(torch.zeros(1, 4, 1, width, dtype=torch.bfloat16) for _ in range(3)))

    run_with_flash_attn(2, rank_main)


MISSING = (
    r"^exchange 'ring_flash_attn' needs the packages flash-attn, ring-flash-attn and transformers before 5\.4 \({}\); "
    r"install them by pip install 'lhcp\[flash\]' --no-build-isolation, or use exchange 'ring'$"
)


def test_a_missing_package_is_one_message_when_the_exchange_is_made() -> None:
    """flash-attn not installed; the ring not; and a transformers that has no longer what the ring imports."""

    def rank_main(rank: int) -> None:
        for name in ("flash_attn", "ring_flash_attn"):
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(sys.modules, name, None)
                with pytest.raises(ConfigError, match=MISSING.format(f".*{name}.*")):
                    package_ring()
        install_flash_attn()
        name = "is_flash_attn_greater_or_equal_2_10"
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(f"transformers.modeling_flash_attention_utils.{name}")
            with pytest.raises(ConfigError, match=MISSING.format(f"cannot import name '{name}' from .*")):
                package_ring()
        package_ring()

    run_ranks(2, rank_main)
    ContextParallel(None, "zigzag", "ring_flash_attn")  # one rank needs none


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("rank", [0, 1])
def test_training_without_the_package_ends_before_ranks_meet(
    data: Path, rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told by rank 0 alone."""
    path, run_dir = data.parent / "run.yaml", data.parent / "run"
    path.write_text(f"""
        {{output_dir: {run_dir}, seq_len: 512, global_batch_size: 2, compute_dtype: bfloat16, model: {{preset: tiny}},
        data: {{path: {data}}}, parallel: {{cp: 2, exchange: ring_flash_attn}}, eval: {{sequences: 0}},
        stages: [{{mode: dense, steps: 2}}]}}
    """)
    monkeypatch.delattr(train, "process_group")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # by which other ranks let rank 0 speak first
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))

    assert train.main([str(path)]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch("error: " + MISSING.strip("^$").format(".*") + "\n" if rank == 0 else "", said), said
    assert not run_dir.exists()


def test_a_model_trains_with_it(data: Path) -> None:
    """Two steps, Lighthouse and dense, in bfloat16 over float32 weights: the losses that the ring of ours makes."""
    values = {
        "stages": [{"mode": "lighthouse", "steps": 1}, {"mode": "dense", "steps": 1}],
        "model": make_config(data, 1, 1).model.model_dump() | {"head_dim": 8},
        "dtype": "float32", "compute_dtype": "bfloat16", "device": "auto",
    }  # fmt: skip

    def steps(exchange: str) -> tuple[list[tuple[float, float]], int]:
        trainer = make_trainer(make_config(data, 1, 2, **values, parallel={"dp": 1, "cp": 2, "exchange": exchange}))
        with sends() as sent:
            return [trainer.train_step() for _ in range(2)], sum(sent)

    found, expected = run_with_flash_attn(2, lambda rank: (steps("ring_flash_attn"), steps("ring")))[0]
    for step, other in zip(found[0], expected[0], strict=True):
        assert step == pytest.approx(other, rel=1e-3)
    assert found[1] > expected[1] > 0
