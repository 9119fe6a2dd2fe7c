"""Lighthouse attention, forward and backward, against the oracle in float64.

Shape suffixes: S slots of the sub-sequence, D head dimension.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import pytest
import torch

import oracle
from lhcp.attention import LighthouseConfig, Selection, lighthouse_attention, select, select_from_scores
from lhcp.config import ConfigError

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    """A legal shape and configuration."""

    batch: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_levels: int
    pooling_factor: int
    topk: int
    num_strata: int
    cover_prefix: bool = True

    @property
    def cfg(self) -> LighthouseConfig:
        return LighthouseConfig(
            num_levels=self.num_levels,
            pooling_factor=self.pooling_factor,
            topk=self.topk,
            num_strata=self.num_strata,
            cover_prefix=self.cover_prefix,
        )

    def make_qkv(self, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        shapes = [(self.batch, self.seq_len, h, self.head_dim) for h in heads]
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        return [x.to(dtype).requires_grad_() for x in tensors]

    def make_selection(self, seed: int = 1) -> Selection:
        """A selection that has nothing to do with q and k; every sequence and KV head has its own."""
        generator = torch.Generator().manual_seed(seed)
        shape = (2, self.batch, self.num_kv_heads, self.seq_len)
        query_scores, key_scores = torch.rand(shape, generator=generator)
        return select_from_scores(query_scores, key_scores, self.cfg)


CASES = {
    "L2 p2": Case(2, 32, 1, 1, 6, 2, 2, 4, 1),
    "L2 p3 three strata": Case(1, 54, 3, 1, 6, 2, 3, 9, 3),
    "L2 p4": Case(1, 80, 2, 2, 16, 2, 4, 7, 1),
    "L3 p2 GQA": Case(2, 48, 4, 2, 10, 3, 2, 6, 2),
    "L3 p3": Case(1, 135, 2, 2, 10, 3, 3, 6, 3),
    "L3 p4 GQA": Case(2, 96, 4, 1, 6, 3, 4, 6, 2),
    "L4 p2": Case(1, 192, 2, 1, 10, 4, 2, 16, 4),
    "L4 p3": Case(1, 162, 2, 2, 6, 4, 3, 4, 2),
    "L4 p4": Case(1, 256, 2, 2, 8, 4, 4, 4, 2),
    "whole coarsest level selected": Case(1, 36, 2, 1, 6, 3, 2, 9, 3),
    "head dim 1": Case(1, 24, 1, 1, 1, 3, 2, 4, 2),
    "no prefix cover": Case(2, 64, 2, 1, 6, 3, 2, 4, 2, cover_prefix=False),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
SMALL_CASES = pytest.mark.parametrize(
    "case", [CASES["L3 p2 GQA"], CASES["L2 p3 three strata"]], ids=["L3 p2 GQA", "L2 p3 three strata"]
)


@pytest.fixture(autouse=True, scope="module")
def _poison_uninitialized_memory() -> Iterator[None]:
    """torch.empty is filled with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    return float(difference / torch.linalg.vector_norm(expected.double()))


def out_and_grads(attend: Attention, qkv: list[torch.Tensor]) -> list[torch.Tensor]:
    """The output, and the gradients of q, k and v for a random gradient of the output."""
    inputs = [x.detach().requires_grad_() for x in qkv]
    out = attend(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights.to(out.dtype))]


def implementation(case: Case, selection: Selection | None = None) -> Attention:
    return lambda q, k, v: lighthouse_attention(q, k, v, case.cfg, selection=selection)


def reference(case: Case, entries: list[list[list[int]]]) -> Attention:
    return lambda q, k, v: oracle.attention(q, k, v, entries, case.num_levels, case.pooling_factor)


def oracle_entries(case: Case, q: torch.Tensor, k: torch.Tensor) -> list[list[list[int]]]:
    query_scores, key_scores = oracle.norm_scores(q, k, case.num_kv_heads)
    return oracle.select(
        query_scores,
        key_scores,
        case.num_levels,
        case.pooling_factor,
        case.topk,
        case.num_strata,
        case.cover_prefix,
    )


def assert_equal_to_rounding(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for got, wanted in zip(actual, expected, strict=True):
        assert got.shape == wanted.shape
        assert got.dtype == torch.float64
        assert relative_error(got, wanted) <= 1e-12


@EVERY_CASE
def test_output_and_gradients_equal_the_oracle(case: Case) -> None:
    """From q and k to the gradients; scores of no gradient in the oracle, so none in the implementation."""
    qkv = case.make_qkv(torch.float64)
    entries = oracle_entries(case, *qkv[:2])
    expected = out_and_grads(reference(case, entries), qkv)
    assert_equal_to_rounding(out_and_grads(implementation(case), qkv), expected)


@EVERY_CASE
def test_given_selection_is_used(case: Case) -> None:
    qkv = case.make_qkv(torch.float64)
    selection = case.make_selection()
    expected = out_and_grads(reference(case, selection.entries.tolist()), qkv)
    assert_equal_to_rounding(out_and_grads(implementation(case, selection), qkv), expected)


@SMALL_CASES
def test_large_logits(case: Case) -> None:
    """Logits of several thousands, where a softmax that does not subtract the maximum overflows."""
    q, k, v = (x.detach() for x in case.make_qkv(torch.float64))
    qkv = [50 * q, 50 * k, v]
    selection = case.make_selection()
    out, expected = implementation(case, selection)(*qkv), reference(case, selection.entries.tolist())(*qkv)
    # The logits carry rounding of their own size into the exponent.
    largest_logit = 50 * 50 * case.head_dim * float(q.abs().max() * k.abs().max())
    assert relative_error(out, expected) <= largest_logit * torch.finfo(torch.float64).eps


@SMALL_CASES
def test_reused_selection_gives_the_same_bits(case: Case) -> None:
    qkv = case.make_qkv(torch.float32)
    selection = select(*qkv[:2], case.cfg)
    first = out_and_grads(implementation(case), qkv)
    for again in [out_and_grads(implementation(case, selection), qkv) for _ in range(2)]:
        for got, wanted in zip(again, first, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_only_some_inputs(needed: tuple[int, ...]) -> None:
    case = CASES["L3 p2 GQA"]
    qkv = case.make_qkv(torch.float64)
    selection = case.make_selection()
    _, *expected = out_and_grads(reference(case, selection.entries.tolist()), qkv)
    inputs = [x.detach().requires_grad_(i in needed) for i, x in enumerate(qkv)]
    out = implementation(case, selection)(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grads = torch.autograd.grad(out, [inputs[i] for i in needed], weights)
    assert_equal_to_rounding(list(grads), [expected[i] for i in needed])


def test_gradient_of_a_sum_has_no_strides() -> None:
    """The gradient that reaches the output is then one number, expanded."""
    case = CASES["L3 p2 GQA"]
    qkv = case.make_qkv(torch.float64)
    selection = case.make_selection()
    expected = torch.autograd.grad(reference(case, selection.entries.tolist())(*qkv).sum(), qkv)
    actual = torch.autograd.grad(implementation(case, selection)(*qkv).sum(), qkv)
    assert_equal_to_rounding(list(actual), list(expected))


@pytest.mark.parametrize("heads_first", [False, True])
def test_views_of_a_fused_projection(heads_first: bool) -> None:
    case = Case(2, 48, 2, 2, 6, 3, 2, 6, 2)
    generator = torch.Generator().manual_seed(3)
    shape = (case.batch, case.num_heads, 3, case.seq_len, 2 * case.head_dim)
    if not heads_first:
        shape = (case.batch, case.seq_len, 3, case.num_heads, 2 * case.head_dim)
    fused = torch.randn(shape, generator=generator, dtype=torch.float64)[..., ::2]
    qkv = list((fused.transpose(1, 3) if heads_first else fused).unbind(2))
    assert not any(x.is_contiguous() for x in qkv)
    assert qkv[0].shape == (case.batch, case.seq_len, case.num_heads, case.head_dim)

    expected = out_and_grads(reference(case, oracle_entries(case, *qkv[:2])), qkv)
    assert_equal_to_rounding(out_and_grads(implementation(case), qkv), expected)


def perturbed_after(x: torch.Tensor, position: int) -> torch.Tensor:
    """`x` with every later token replaced."""
    changed = x.detach().clone()
    generator = torch.Generator().manual_seed(position)
    later = changed[:, position + 1 :]
    later.copy_(10 * torch.randn(later.shape, generator=generator, dtype=x.dtype))
    return changed


@pytest.mark.parametrize("name", ["L2 p3 three strata", "L3 p2 GQA", "L3 p4 GQA", "L4 p2"])
def test_no_position_depends_on_a_later_token(name: str) -> None:
    """With the selection held fixed: selection itself looks at a whole stratum."""
    case = CASES[name]
    qkv = case.make_qkv(torch.float64)
    attend = implementation(case, case.make_selection())
    with torch.no_grad():
        out = attend(*qkv)
        for t in range(case.seq_len - 1):
            changed = attend(*[perturbed_after(x, t) for x in qkv])
            assert relative_error(changed[:, : t + 1], out[:, : t + 1]) <= 1e-12
            assert relative_error(changed[:, t + 1 :], out[:, t + 1 :]) > 1e-3


@SMALL_CASES
def test_position_without_rows_is_zero(case: Case) -> None:
    uncovered_case = dataclasses.replace(case, cover_prefix=False)
    rising = torch.arange(case.seq_len, dtype=torch.float32).expand(case.batch, case.num_kv_heads, -1)
    selection = select_from_scores(rising, rising, uncovered_case.cfg)
    rows_received = oracle.fan_in(selection.entries[0, 0].tolist(), case.seq_len, case.num_levels, case.pooling_factor)
    assert rows_received[0] == 0
    qkv = case.make_qkv(torch.float64)
    out = implementation(uncovered_case, selection)(*qkv)
    received = torch.tensor(rows_received) > 0
    assert (out[:, ~received] == 0).all()
    assert (out[:, received] != 0).all()


# --- error in the dtypes that are trained in ---


def plain_attention(case: Case, selection: Selection) -> Attention:
    """The same computation with ordinary PyTorch operations, each in the dtype of its input."""

    def head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, entries: list[int]) -> torch.Tensor:
        pyramid = (case.num_levels, case.pooling_factor)
        q_SD, k_SD, v_SD = (oracle.pooled_rows(x, entries, *pyramid) for x in (q, k, v))
        later = torch.ones(len(entries), len(entries), dtype=torch.bool).triu(1)
        logits = (q_SD @ k_SD.T / math.sqrt(case.head_dim)).masked_fill(later, -math.inf)
        return oracle.scattered_rows(logits.softmax(dim=1) @ v_SD, entries, case.seq_len, *pyramid)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = case.num_heads // case.num_kv_heads
        heads = [
            head(q[b, :, h], k[b, :, h // group], v[b, :, h // group], entries[h // group])
            for b, entries in enumerate(selection.entries.tolist())
            for h in range(case.num_heads)
        ]
        return torch.stack(heads).unflatten(0, (case.batch, case.num_heads)).transpose(1, 2)

    return attend


LOW_PRECISION_CASES = {
    "L3 p4 GQA": Case(1, 256, 4, 2, 16, 3, 4, 12, 4),
    "L4 p2": Case(2, 192, 2, 2, 32, 4, 2, 16, 4),
    "L3 p3": Case(1, 216, 2, 1, 10, 3, 3, 12, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LOW_PRECISION_CASES.values(), ids=LOW_PRECISION_CASES.keys())
def test_error_is_at_most_twice_that_of_plain_pytorch(case: Case, dtype: torch.dtype) -> None:
    qkv = case.make_qkv(dtype)
    selection = case.make_selection()
    exact = out_and_grads(reference(case, selection.entries.tolist()), [x.double() for x in qkv])
    plain = out_and_grads(plain_attention(case, selection), qkv)
    actual = out_and_grads(implementation(case, selection), qkv)
    for got, same_dtype, wanted in zip(actual, plain, exact, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, wanted) <= 2 * relative_error(same_dtype, wanted)


def test_pooled_row_is_rounded_once() -> None:
    """The first slot attends to itself alone, so its output is its own pooled value.

    Scores that rise make it the coarsest entry 0, and position 15 receives nothing else. Sums of these 16
    integers are exact, their means do not fit into bfloat16, and means of rounded means differ.
    """
    case = Case(1, 128, 1, 1, 256, 3, 4, 4, 1, cover_prefix=False)
    rising = torch.arange(128.0).reshape(1, 1, -1)
    v = torch.randint(-128, 129, (1, 128, 1, 256), generator=torch.Generator().manual_seed(4))
    q, k, _ = case.make_qkv(torch.bfloat16)
    out = implementation(case, select_from_scores(rising, rising, case.cfg))(q, k, v.bfloat16())
    torch.testing.assert_close(out[:, 15], v[:, :16].double().mean(dim=1).bfloat16(), rtol=0, atol=0)


def test_plain_pytorch_equals_the_oracle_in_float64() -> None:
    case = LOW_PRECISION_CASES["L3 p4 GQA"]
    qkv = case.make_qkv(torch.float64)
    selection = case.make_selection()
    expected = out_and_grads(reference(case, selection.entries.tolist()), qkv)
    assert_equal_to_rounding(out_and_grads(plain_attention(case, selection), qkv), expected)


@pytest.mark.parametrize("valid_len", [-1, 0, 65])
def test_a_length_that_cannot_be_is_refused(valid_len: int) -> None:
    config = LighthouseConfig(num_levels=2, pooling_factor=2, topk=8, num_strata=2)
    q = torch.randn(1, 64, 1, 4)
    for function in (lambda: lighthouse_attention(q, q, q, config, valid_len=valid_len),
                     lambda: select(q, q, config, valid_len=valid_len)):  # fmt: skip
        with pytest.raises(ConfigError, match=f"valid_len {valid_len}: must be 1 to 64, tokens of the whole sequence"):
            function()
