"""Every Triton kernel against `reference`: on a GPU, or in Triton's interpreter where there is none.

Collected by tests/gpu/test_kernels_cuda.py, and by tests/unit/test_kernels.py in a process that interprets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from lhcp.attention import LighthouseConfig, lighthouse, select
from lhcp.attention import selection as selection_module
from lhcp.kernels.lighthouse import PyramidShape, ops, reference
from lhcp.kernels.lighthouse import pool as pool_kernels
from lhcp.kernels.lighthouse import select as select_kernels
from lhcp.kernels.lighthouse.tile import first_stored

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def _poison_uninitialized_memory() -> Iterator[None]:
    """torch.empty is filled with NaN, or the largest integer: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="module")
def _round_as_a_gpu_does() -> Iterator[None]:
    """Triton's interpreter cuts bfloat16 off where every GPU rounds to the nearest."""
    convert = interpreter._convert_float

    def rounding(value: Any, source: Any, target: Any, mode: Any) -> Any:
        if target == tl.bfloat16:
            return torch.from_numpy(value.astype("float32")).bfloat16().view(torch.int16).numpy()
        return convert(value, source, target, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounding)
        yield


@dataclass(frozen=True)
class Case:
    """Shapes and numbers of one layer."""

    batch: int
    tokens: int
    heads: int
    groups: int
    width: int
    levels: int
    p: int
    budget: int
    strata: int
    cover: bool = True

    @property
    def shape(self) -> PyramidShape:
        return PyramidShape(self.tokens, self.levels, self.p)

    @property
    def config(self) -> LighthouseConfig:
        return LighthouseConfig(
            num_levels=self.levels,
            pooling_factor=self.p,
            topk=self.budget * self.strata,
            num_strata=self.strata,
            cover_prefix=self.cover,
        )

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        """q, k, v and the gradient of an output, as strided views of one fused projection."""
        generator = torch.Generator().manual_seed(seed)
        heads = (self.heads, self.groups, self.groups, self.heads)
        fused = torch.randn(self.batch, self.tokens, sum(heads), self.width, generator=generator, dtype=torch.float64)
        return list(fused.to(DEVICE, dtype).split(heads, dim=2))

    def bits(self, seed: int = 1) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(2, self.batch, self.groups, self.tokens, generator=generator).to(DEVICE)
        return reference.score_bits(scores[0], self.shape), reference.score_bits(scores[1], self.shape)

    def index(self) -> tuple[Tensor, Tensor]:
        """Rows of a selection that has nothing to do with q and k, and their inverse."""
        rows = reference.select(*self.bits(), self.shape, self.strata, self.budget, self.cover)
        return rows, reference.invert(rows, self.shape.offsets[-1])


CASES = {
    "L2 p2": Case(2, 24, 1, 1, 6, 2, 2, 3, 1),
    "L3 p4 GQA": Case(1, 96, 4, 1, 16, 3, 4, 2, 2),
    "L3 p3 three query heads": Case(2, 108, 6, 2, 10, 3, 3, 3, 2),
    "L4 p2 all selected": Case(1, 64, 2, 2, 9, 4, 2, 4, 2),
    "L2 p9": Case(1, 36, 1, 1, 5, 2, 9, 2, 2),
    "no cover": Case(2, 80, 2, 1, 8, 3, 2, 2, 2, cover=False),
}
if not INTERPRETED:  # each costs seconds of compiling
    CASES = {name: CASES[name] for name in ("L3 p4 GQA", "L2 p2", "no cover")}
    CASES |= {
        "98K": Case(1, 98_304, 8, 8, 128, 3, 4, 96, 16),
        "GQA 32K": Case(2, 32_768, 16, 4, 64, 4, 4, 32, 8),
        "wide": Case(1, 6_912, 12, 2, 256, 4, 3, 8, 8),
    }
# In the interpreter, where each takes a second: all in bfloat16, two in float32.
PAIRS = [(name, dtype) for name in CASES for dtype in DTYPES]
if INTERPRETED:
    PAIRS = [(name, dtype) for name, dtype in PAIRS if dtype == torch.bfloat16 or name in ("L3 p4 GQA", "L2 p2")]
EVERY_CASE = pytest.mark.parametrize(
    ("case", "dtype"), [(CASES[name], dtype) for name, dtype in PAIRS], ids=[f"{name} {dtype}" for name, dtype in PAIRS]
)


def relative(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact.double()).norm() / exact.double().norm())


def assert_as_exact(value: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Error at most twice that of plain PyTorch in the same dtype, which is exact where it only copies."""
    assert value.shape == exact.shape
    assert value.dtype == plain.dtype
    assert relative(value, exact) <= 2 * max(relative(plain, exact), 2**-24)


def with_grads(function: Any, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs, then gradients of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, grads)]


class using_kernels:
    """The Triton kernels in the layer, also on CPUs."""

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        if INTERPRETED:
            for module in (lighthouse, selection_module):
                self.patch.setattr(module, "kernels_for", lambda x: ops)

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


# --- pool and score ---


@EVERY_CASE
def test_pooled_rows(case: Case, dtype: torch.dtype) -> None:
    for x in case.tensors(dtype):
        pooled, bits = pool_kernels.pool(x, case.groups, case.shape)
        first = case.shape.offsets[first_stored(case.levels)]
        assert bits.numel() == 0
        plain = reference.pyramid_rows(x, case.shape)[:, first:]
        assert_as_exact(pooled, plain, reference.pyramid_rows(x.double(), case.shape)[:, first:])


@EVERY_CASE
def test_scores(case: Case, dtype: torch.dtype) -> None:
    """Norms in another order of summation, so the last bits may differ; the same alone and while pooling."""
    q, k, v, _ = case.tensors(dtype)
    query = ops.score(q, case.groups, case.shape)
    exact = reference.score(q.double(), case.groups, case.shape).view(torch.float64)
    error = (query.view(torch.float32).double() - exact).abs() / exact
    assert float(error.max()) <= (case.width * case.heads / case.groups / 2 + 2) * 2**-24
    _, bits = ops.pool(q, k, v, case.shape, scores=True)
    assert bits is not None
    assert torch.equal(bits[0], query)
    assert torch.equal(bits[1], ops.score(k, case.groups, case.shape))


@EVERY_CASE
def test_equal_rows_have_equal_scores(case: Case, dtype: torch.dtype) -> None:
    """Wherever they are: in a view of a projection, in a tensor of their own, in part of the sequence."""
    if INTERPRETED and (case is not CASES["L3 p4 GQA"] or dtype == torch.float32):
        pytest.skip("numpy adds in one order: only a GPU can fail here in more than one case")
    for x in case.tensors(dtype)[:2]:
        levels = ops.score(x, case.groups, case.shape).split(case.shape.sizes[1:], -1)
        shifted = torch.cat([x[..., :1], x], -1)[..., 1:]  # rows that begin at odd addresses
        for same in (x.clone(), x.transpose(1, 2).contiguous().transpose(1, 2), shifted):
            assert torch.equal(ops.score(same, case.groups, case.shape), torch.cat(levels, -1))
        stratum = PyramidShape(case.tokens // case.strata, case.levels, case.p)
        last = ops.score(x[:, -stratum.length :], case.groups, stratum)
        assert torch.equal(
            last, torch.cat([level[..., -size:] for level, size in zip(levels, stratum.sizes[1:], strict=True)], -1)
        )
    kinds = torch.randn(3, case.heads, case.width, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    x = kinds[torch.arange(case.tokens, device=DEVICE) * 7 % 3].expand(case.batch, -1, -1, -1)
    assert all(len(head.unique()) <= 3 for head in ops.score(x, case.groups, case.shape).flatten(0, 1))


def test_scores_are_ordered_where_they_are_not_finite() -> None:
    case = CASES["L2 p2"]
    q = torch.ones(1, 8, 1, 6, device=DEVICE)
    q[0, 2, 0, 1], q[0, 5, 0, 0], q[0, 6, 0, 3] = math.inf, math.nan, -math.nan
    bits = ops.score(q, 1, PyramidShape(8, 2, 2))[0, 0].tolist()
    infinity = int(torch.tensor(math.inf).view(torch.int32))
    assert bits[0] < bits[1] == infinity < bits[2]
    assert bits[3] > infinity
    checked = LighthouseConfig(num_levels=2, pooling_factor=2, topk=2, num_strata=1, check_finite=True)
    assert case.levels == checked.num_levels
    with using_kernels(), pytest.raises(FloatingPointError):
        select(q, torch.ones_like(q), checked)


# --- select ---

# Levels, pooling factor, strata, coarsest entries of a stratum, budget: every legal budget of one forest, and others.
FORESTS = [
    *((3, 2, 1, 7, budget) for budget in range(2, 8)),
    (2, 4, 2, 5, 3),
    (4, 2, 1, 6, 4),
    (4, 3, 1, 4, 2),
    (3, 4, 1, 11, 7),
    (2, 2, 3, 4, 4),
]
if not INTERPRETED:
    FORESTS += [(3, 4, 3, 37, 31), (4, 3, 2, 512, 128), (2, 2, 2, 512, 512), (4, 4, 2, 512, 511)]
STREAMED = [(3, 2, 1, 7, 5)] + ([] if INTERPRETED else [(4, 2, 1, 6, 4)])
LARGE = [(2, 4, 2, 8_192, 4_000), (3, 2, 1, 20_000, 9_999), (2, 2, 1, 50_000, 50_000)]


def score_kinds(shape: tuple[int, ...], seed: int) -> Iterator[tuple[str, Tensor]]:
    """Scores that are hard to order."""
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(2**31 - 1, shape, generator=generator)
    yield "continuous", torch.rand(shape, generator=generator)
    yield "few values", (integers % 3).float()
    yield "all equal", torch.full(shape, 0.7)
    yield "all zero", torch.zeros(shape)
    yield "neighbours", 1 + (integers % 5).float() * 2**-23
    yield "not finite", torch.tensor([0.0, 1.0, math.inf, math.nan])[integers % 4]
    yield "any pattern", (integers % 0x7F800001).to(torch.int32).view(torch.float32)


def assert_selects_as_the_reference(forest: tuple[int, int, int, int, int]) -> None:
    """Bit for bit, given the same scores, of every kind."""
    levels, p, strata, coarsest, budget = forest
    shape = PyramidShape(strata * coarsest * p ** (levels - 1), levels, p)
    for cover in (True, False):
        scores = [x for kind, x in score_kinds((2, 1, shape.length), seed=budget) if (kind == "continuous") != cover]
        bits = [reference.score_bits(torch.stack([x[side] for x in scores]).to(DEVICE), shape) for side in (0, 1)]
        expected = reference.select(*bits, shape, strata, budget, cover)
        assert torch.equal(ops.select(*bits, shape, strata, budget, cover), expected)


@pytest.mark.parametrize("forest", FORESTS, ids=str)
def test_selection_is_that_of_the_reference(forest: tuple[int, int, int, int, int]) -> None:
    assert_selects_as_the_reference(forest)


@pytest.mark.parametrize("forest", STREAMED, ids=str)
def test_streamed_selection(forest: tuple[int, int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """More candidates than a program holds."""
    monkeypatch.setattr(select_kernels, "LARGEST_BLOCK", 4)
    assert_selects_as_the_reference(forest)


@pytest.mark.skipif(INTERPRETED, reason="takes minutes in the interpreter")
@pytest.mark.parametrize("forest", LARGE, ids=str)
def test_strata_larger_than_a_block(forest: tuple[int, int, int, int, int]) -> None:
    assert_selects_as_the_reference(forest)


# --- gather and scatter back, with gradients ---


@EVERY_CASE
def test_gather(case: Case, dtype: torch.dtype) -> None:
    *qkv, _ = case.tensors(dtype)
    rows, inverse = case.index()
    slots = rows.shape[-1]
    grads = [x[:, :1].expand(-1, slots, -1, -1) * (torch.arange(slots, device=DEVICE) % 7 - 3).view(1, -1, 1, 1)
             for x in case.tensors(dtype, seed=5)[:3]]  # fmt: skip

    def gather(kernels: Any) -> Any:
        def function(*qkv: Tensor) -> Any:
            pooled, _ = kernels.pool(*qkv, case.shape, scores=False)
            return kernels.gather(qkv, pooled, rows, inverse, case.shape)

        return function

    exact = with_grads(gather(reference), [x.double() for x in qkv], [x.double() for x in grads])
    plain = with_grads(gather(reference), qkv, grads)
    for value, other, expected in zip(with_grads(gather(ops), qkv, grads), plain, exact, strict=True):
        assert_as_exact(value, other, expected)


@EVERY_CASE
@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_scatter_back(case: Case, dtype: torch.dtype, chunks: int) -> None:
    """In one chunk without a halo (0) and with one, and in two."""
    if case.strata % max(1, chunks):
        pytest.skip("a chunk is a whole number of strata")
    rows, inverse = case.index()
    generator = torch.Generator().manual_seed(2)
    sub_shape = (case.batch, rows.shape[-1], case.heads, case.width)
    sub = torch.randn(sub_shape, generator=generator).to(DEVICE, dtype).transpose(1, 2).contiguous().transpose(1, 2)
    halo_shape = (chunks, case.levels - 1, case.batch, case.heads, case.width)
    inputs = [sub, torch.randn(halo_shape, generator=generator).to(DEVICE)] if chunks else [sub]
    grad = case.tensors(dtype)[3]

    def scatter(kernels: Any) -> Any:
        def function(sub: Tensor, halo: Tensor | None = None) -> Tensor:
            return kernels.scatter_back(sub, rows, inverse, case.shape, max(1, chunks), halo)

        return function

    exact = with_grads(scatter(reference), [x.double() for x in inputs], [grad.double()])
    plain = with_grads(scatter(reference), inputs, [grad])
    for value, other, expected in zip(with_grads(scatter(ops), inputs, [grad]), plain, exact, strict=True):
        assert_as_exact(value, other, expected)


def differently_stored(x: Tensor) -> dict[str, Tensor]:
    """The same values in other places of memory."""
    return {
        "heads first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "tokens last": x.movedim(1, -1).contiguous().movedim(-1, 1),
        "every second": torch.stack([x, x], -1).flatten(-2)[..., ::2],
        "odd address": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    }


@pytest.mark.parametrize("width", [6] if INTERPRETED else [6, 16])
@pytest.mark.parametrize("name", ["heads first", "tokens last", "every second", "odd address"])
def test_rows_may_lie_anywhere(name: str, width: int) -> None:
    """Forward and backward of every op, bit for bit."""
    case = Case(2, 48, 4, 2, width, 3, 2, 2, 2)
    rows, inverse = case.index()

    def run(q: Tensor, k: Tensor, v: Tensor, out: Tensor, grads: list[Tensor]) -> list[Tensor]:
        pooled, bits = ops.pool(q, k, v, case.shape, scores=True)
        assert bits is not None
        sub = ops.gather((q, k, v), pooled, rows, inverse, case.shape)
        back = torch.ops.lhcp.gather_backward(*grads, inverse, case.tokens, case.levels, case.p)
        whole = ops.scatter_back(grads[0], rows, inverse, case.shape, 1, None)
        sub_grad = torch.ops.lhcp.scatter_back_backward(out, rows, case.levels, case.p, 1)
        return [*pooled, *bits, ops.score(q, case.groups, case.shape), *sub, *back, whole, sub_grad]

    tensors = [x.contiguous() for x in case.tensors(torch.float32)]
    grads = [x[:, : rows.shape[-1]].contiguous() for x in case.tensors(torch.float32, seed=1)[:3]]
    expected = run(*tensors, grads)
    other = run(*(differently_stored(x)[name] for x in tensors), [differently_stored(x)[name] for x in grads])
    assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))


def test_a_gradient_may_be_one_number_expanded() -> None:
    case = CASES["L3 p4 GQA"]
    rows, inverse = case.index()
    sub = case.tensors(torch.float32)[0][:, : rows.shape[-1]].clone().requires_grad_()
    ops.scatter_back(sub, rows, inverse, case.shape, 1, None).sum().backward()
    got, sub.grad = sub.grad, None
    reference.scatter_back(sub, rows, inverse, case.shape, 1, None).sum().backward()
    torch.testing.assert_close(got, sub.grad)
