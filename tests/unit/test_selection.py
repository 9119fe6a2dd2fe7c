"""Selection against the oracle: exact indices in exact order, and the structure that every selection has."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import oracle
from lhcp.attention import LighthouseConfig, Selection, select, select_from_scores
from lhcp.kernels.lighthouse import reference

SCORE_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclasses.dataclass(frozen=True)
class Case:
    """A legal shape and configuration; the seed fills the tensors."""

    batch: int
    num_kv_heads: int
    seq_len: int
    cfg: LighthouseConfig
    seed: int

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


LONGEST = 256
FORESTS = [
    (num_levels, pooling_factor, num_strata)
    for num_levels in range(2, 7)
    for pooling_factor in range(2, 6)
    for num_strata in range(1, 5)
    if 2 * num_strata * pooling_factor ** (num_levels - 1) <= LONGEST
]


def legal_budgets(most: int) -> list[tuple[int, int]]:
    """(coarsest entries of a stratum, m) with 2 <= m <= coarsest <= most."""
    return [
        (coarsest, budget)
        for coarsest in range(2, most + 1)
        for budget in sorted({2, 3, coarsest // 2, 2 * coarsest // 3, coarsest - 1, coarsest})
        if 2 <= budget <= coarsest
    ]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    # Drawn from lists because separate integers mostly come out at their smallest, where all is selected.
    num_levels, pooling_factor, num_strata = draw(st.sampled_from(FORESTS))
    most = LONGEST // (num_strata * pooling_factor ** (num_levels - 1))
    coarsest, budget = draw(st.sampled_from(legal_budgets(most)))
    cfg = LighthouseConfig(
        num_levels=num_levels,
        pooling_factor=pooling_factor,
        topk=num_strata * budget,
        num_strata=num_strata,
        cover_prefix=draw(st.booleans()),
    )
    return Case(
        batch=draw(st.integers(1, 2)),
        num_kv_heads=draw(st.integers(1, 3)),
        seq_len=num_strata * coarsest * cfg.coarsest_window,
        cfg=cfg,
        seed=draw(st.integers(0, 2**32)),
    )


ONE_CASE = Case(
    batch=2,
    num_kv_heads=2,
    seq_len=96,
    cfg=LighthouseConfig(num_levels=3, pooling_factor=2, topk=9, num_strata=3),
    seed=0,
)


@pytest.fixture(autouse=True, scope="module")
def _poison_uninitialized_memory() -> Iterator[None]:
    """torch.empty is filled with NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_scores(kind: str, case: Case, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Level-0 scores [B, H_kv, N] of a kind that is hard for some way of sorting."""
    shape = (case.batch, case.num_kv_heads, case.seq_len)

    def integers(high: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    bits = SCORE_BITS[dtype]
    inf_bits = int(torch.tensor(math.inf, dtype=dtype).view(bits))
    match kind:
        case "continuous":
            return torch.randn(shape, generator=generator, dtype=dtype).abs()
        case "all zero":
            return torch.zeros(shape, dtype=dtype)
        case "all equal":
            return torch.full(shape, 0.7, dtype=dtype)
        case "few values":
            return integers(3).to(dtype)
        case "neighbours":  # they differ in the last bits only
            return 1 + integers(8).to(dtype) * torch.finfo(dtype).eps
        case "any magnitude":  # subnormals to inf
            return (integers(2**31) % 97 * (inf_bits // 96)).to(bits).view(dtype)
        case "not finite":
            values = torch.tensor([0.0, 1.0, 2.0, math.inf, math.nan], dtype=dtype)
            return values[integers(len(values))]
        case "one nan":
            values = torch.rand(shape, generator=generator, dtype=dtype)
            values[..., case.seed % case.seq_len] = math.nan
            return values
        case "nan only":
            return torch.full(shape, math.nan, dtype=dtype)
    raise AssertionError(kind)


SCORE_KINDS = st.sampled_from(
    [
        "continuous",
        "all zero",
        "all equal",
        "few values",
        "neighbours",
        "any magnitude",
        "not finite",
        "one nan",
        "nan only",
    ]
)


def oracle_entries(query_scores: torch.Tensor, key_scores: torch.Tensor, cfg: LighthouseConfig) -> torch.Tensor:
    entries = oracle.select(
        query_scores, key_scores, cfg.num_levels, cfg.pooling_factor, cfg.topk, cfg.strata, cfg.cover_prefix
    )
    return torch.tensor(entries, dtype=torch.int32)


def assert_entries(selection: Selection, expected: torch.Tensor) -> None:
    torch.testing.assert_close(selection.entries, expected, rtol=0, atol=0)


def assert_structure(selection: Selection, case: Case) -> None:
    """What holds of every selection, whatever the scores."""
    cfg, n = case.cfg, case.seq_len
    length = n // cfg.coarsest_window + (cfg.num_levels - 1) * cfg.pooling_factor * cfg.topk
    assert selection.entries.dtype == torch.int32
    assert selection.entries.shape == (case.batch, case.num_kv_heads, length)
    for row in selection.entries.flatten(0, 1).tolist():
        assert_structure_of_row(row, n, cfg)


def assert_structure_of_row(row: list[int], n: int, cfg: LighthouseConfig) -> None:
    num_levels, p = cfg.num_levels, cfg.pooling_factor
    entries = [oracle.level_and_index(flat, n, num_levels, p) for flat in row]
    order = [(oracle.end_of(level, index, p), level) for level, index in entries]
    assert all(earlier < later for earlier, later in itertools.pairwise(order))
    coarsest = [index for level, index in entries if level == num_levels - 1]
    assert coarsest == list(range(n // cfg.coarsest_window))
    slots = len(row) // cfg.strata
    tokens = n // cfg.strata
    assert [end // tokens for end, _ in order] == [slot // slots for slot in range(len(row))]
    for level in range(num_levels - 1):
        per_stratum = [0] * cfg.strata
        for entry_level, index in entries:
            if entry_level == level:
                per_stratum[index * p**level // tokens] += 1
        assert per_stratum == [p * cfg.topk // cfg.strata] * cfg.strata
    rows_received = oracle.fan_in(row, n, num_levels, p)
    assert max(rows_received) <= num_levels
    if cfg.cover_prefix:
        assert min(rows_received) >= 1


@settings(max_examples=600)
@given(
    case=cases(),
    query_kind=SCORE_KINDS,
    key_kind=SCORE_KINDS,
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@example(case=ONE_CASE, query_kind="nan only", key_kind="nan only", dtype=torch.float32)
@example(case=ONE_CASE, query_kind="neighbours", key_kind="neighbours", dtype=torch.float64)
def test_entries_equal_the_oracle(case: Case, query_kind: str, key_kind: str, dtype: torch.dtype) -> None:
    generator = case.generator()
    query_scores = make_scores(query_kind, case, dtype, generator)
    key_scores = make_scores(key_kind, case, dtype, generator)
    selection = select_from_scores(query_scores, key_scores, case.cfg)
    assert_structure(selection, case)
    assert_entries(selection, oracle_entries(query_scores, key_scores, case.cfg))


@settings(max_examples=60)
@given(case=cases(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_structure_holds_for_any_bits(case: Case, dtype: torch.dtype) -> None:
    """Of a NaN, neither sign nor payload is defined: x86 makes negative ones of inf - inf."""
    shape = (2, case.batch, case.num_kv_heads, case.seq_len)
    limits = torch.iinfo(SCORE_BITS[dtype])
    bits = torch.randint(limits.min, limits.max, shape, generator=case.generator(), dtype=SCORE_BITS[dtype])
    random_scores = bits.view(dtype)
    valid = (random_scores >= 0) | random_scores.isnan()
    query_scores, key_scores = torch.where(valid, random_scores, -math.nan)
    assert_structure(select_from_scores(query_scores, key_scores, case.cfg), case)


def test_scores_may_be_strided() -> None:
    shape = (ONE_CASE.batch, ONE_CASE.seq_len, 2, ONE_CASE.num_kv_heads)
    scores = torch.rand(shape, generator=ONE_CASE.generator())
    query_scores, key_scores = scores.permute(2, 0, 3, 1)
    assert not query_scores.is_contiguous()
    expected = oracle_entries(query_scores, key_scores, ONE_CASE.cfg)
    assert_entries(select_from_scores(query_scores, key_scores, ONE_CASE.cfg), expected)


@pytest.mark.parametrize("cover_prefix", [True, False])
def test_prefix_without_cover_receives_nothing(cover_prefix: bool) -> None:
    """Rising scores never choose the first entries, so only the cover brings rows to the first positions."""
    cfg = LighthouseConfig(num_levels=3, pooling_factor=4, topk=4, num_strata=1, cover_prefix=cover_prefix)
    scores = torch.arange(128.0).reshape(1, 1, -1)
    [[row]] = select_from_scores(scores, scores, cfg).entries.tolist()
    rows_received = oracle.fan_in(row, 128, 3, 4)
    uncovered = [position for position in range(128) if rows_received[position] == 0]
    assert uncovered == ([] if cover_prefix else list(range(15)))


@pytest.mark.parametrize("rival", [math.inf, math.nan])
def test_prefix_cover_outranks_non_finite_scores(rival: float) -> None:
    cfg = LighthouseConfig(num_levels=2, pooling_factor=2, topk=2, num_strata=1)
    query_scores = torch.full((1, 1, 16), rival)
    query_scores[..., :2] = 0
    key_scores = torch.ones(1, 1, 16)
    key_scores[..., :2] = 0
    [[row]] = select_from_scores(query_scores, key_scores, cfg).entries.tolist()
    assert row[:2] == [0, 1]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of Q and K: [B, N, H, D] and [B, N, H_kv, D]."""

    q: torch.Tensor
    k: torch.Tensor


def make_rows(case: Case, group: int, head_dim: int, dtype: torch.dtype, integers: bool = False) -> Rows:
    generator = case.generator()

    def draw(num_heads: int) -> torch.Tensor:
        shape = (case.batch, case.seq_len, num_heads, head_dim)
        if integers:
            return torch.randint(-3, 4, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return Rows(q=draw(group * case.num_kv_heads), k=draw(case.num_kv_heads))


def norm_scores(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.row_norms(q, k.shape[2]), reference.row_norms(k, k.shape[2])


FLOAT_TYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


@settings(max_examples=60)
@given(case=cases(), group=st.integers(1, 3), head_dim=st.sampled_from([1, 6, 10, 16]), dtype=FLOAT_TYPES)
def test_norm_scores_are_within_rounding(case: Case, group: int, head_dim: int, dtype: torch.dtype) -> None:
    rows = make_rows(case, group, head_dim, dtype)
    expected = oracle.norm_scores(rows.q, rows.k, case.num_kv_heads)
    score_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    # A sum of n squares in any order is off by a relative n u at most, which the square root halves and to
    # which it adds its own rounding u, with u = eps/2.
    bound = (group * head_dim / 2 + 1) * torch.finfo(score_dtype).eps / 2
    for scores, exact in zip(norm_scores(rows.q, rows.k), expected, strict=True):
        assert scores.dtype == score_dtype
        assert scores.shape == exact.shape
        assert ((scores.double() - exact).abs() <= 1.01 * bound * exact).all()


@settings(max_examples=60)
@given(case=cases(), group=st.integers(1, 3), head_dim=st.sampled_from([1, 6, 10, 16]))
def test_select_equals_the_oracle_in_float64(case: Case, group: int, head_dim: int) -> None:
    rows = make_rows(case, group, head_dim, torch.float64)
    expected = oracle_entries(*oracle.norm_scores(rows.q, rows.k, case.num_kv_heads), case.cfg)
    assert_entries(select(rows.q, rows.k, case.cfg), expected)


@settings(max_examples=60)
@given(case=cases(), group=st.integers(1, 3), dtype=FLOAT_TYPES)
def test_select_breaks_exact_ties_like_the_oracle(case: Case, group: int, dtype: torch.dtype) -> None:
    """Rows of small integers have exact sums of squares, so equal norms are equal in every dtype."""
    rows = make_rows(case, group, 4, dtype, integers=True)
    expected = oracle_entries(*oracle.norm_scores(rows.q, rows.k, case.num_kv_heads), case.cfg)
    assert_entries(select(rows.q, rows.k, case.cfg), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_select_is_selection_from_norm_scores(dtype: torch.dtype) -> None:
    rows = make_rows(ONE_CASE, 2, 10, dtype)
    expected = oracle_entries(*norm_scores(rows.q, rows.k), ONE_CASE.cfg)
    assert_entries(select(rows.q, rows.k, ONE_CASE.cfg), expected)


def test_other_rows_can_be_scored() -> None:
    rows = make_rows(ONE_CASE, 2, 6, torch.float32)
    other = make_rows(dataclasses.replace(ONE_CASE, seed=1), 2, 6, torch.float32)
    for score_q, score_k in [(other.q, other.k), (other.q, None), (None, other.k)]:
        scored_q = rows.q if score_q is None else score_q
        scored_k = rows.k if score_k is None else score_k
        selection = select(rows.q, rows.k, ONE_CASE.cfg, score_q=score_q, score_k=score_k)
        assert_entries(selection, oracle_entries(*norm_scores(scored_q, scored_k), ONE_CASE.cfg))


def test_rows_may_be_strided() -> None:
    """Q and K as views of one fused projection, with the heads before the tokens."""
    fused = torch.randn(2, 2, 3, 96, 6, generator=ONE_CASE.generator(), dtype=torch.float64)
    q, k, _ = fused[:, :, :, :, ::2].permute(2, 0, 3, 1, 4)
    expected = oracle_entries(*oracle.norm_scores(q, k, 2), ONE_CASE.cfg)
    assert_entries(select(q, k, ONE_CASE.cfg), expected)


def test_no_gradient_flows_into_a_selection() -> None:
    rows = make_rows(ONE_CASE, 1, 6, torch.float64)
    q, k = rows.q.requires_grad_(), rows.k.requires_grad_()
    assert not select(q, k, ONE_CASE.cfg).entries.requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["query", "key"])
def test_checked_mode_refuses_non_finite_scores(side: str, value: float) -> None:
    checked = ONE_CASE.cfg.model_copy(update={"check_finite": True})
    rows = make_rows(ONE_CASE, 1, 6, torch.float32)
    select(rows.q, rows.k, checked)
    query_scores, key_scores = norm_scores(rows.q, rows.k)
    (query_scores if side == "query" else key_scores)[1, 1, 40] = value
    (rows.q if side == "query" else rows.k)[1, 40, 1, 2] = value
    with pytest.raises(FloatingPointError):
        select(rows.q, rows.k, checked)
    with pytest.raises(FloatingPointError):
        select_from_scores(query_scores, key_scores, checked)
    assert_structure(select(rows.q, rows.k, ONE_CASE.cfg), ONE_CASE)
    assert_entries(
        select_from_scores(query_scores, key_scores, ONE_CASE.cfg),
        oracle_entries(query_scores, key_scores, ONE_CASE.cfg),
    )
