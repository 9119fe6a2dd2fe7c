"""Which numbers of Lighthouse attention are legal together, what is said of others, and how N is padded."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lhcp.config import ConfigError, LighthouseConfig


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What `LighthouseConfig.resolve` judges. No dilation: scorer `norm`."""

    seq_len: int
    num_chunks: int
    num_levels: int
    pooling_factor: int
    topk: int
    num_strata: int | None
    dilation: int | None = None

    @property
    def cfg(self) -> LighthouseConfig:
        scorer: dict[str, Any] = {} if self.dilation is None else {"scorer": "dilated", "dilation": self.dilation}
        return LighthouseConfig(
            num_levels=self.num_levels,
            pooling_factor=self.pooling_factor,
            topk=self.topk,
            num_strata=self.num_strata,
            max_cp=1,
            **scorer,
        )

    def but(self, **changes: Any) -> Numbers:
        return dataclasses.replace(self, **changes)

    @property
    def window(self) -> int:
        return int(self.pooling_factor ** (self.num_levels - 1))

    def resolves(self) -> bool:
        return self.error() is None

    def error(self) -> str | None:
        try:
            self.cfg.resolve(self.seq_len, self.num_chunks)
        except ConfigError as error:
            return str(error)
        return None


def cuts(n: int, parts: int) -> set[Fraction]:
    """Where `n` tokens are cut into equal parts, both ends included."""
    return {Fraction(n * i, parts) for i in range(parts + 1)}


def is_legal(x: Numbers) -> bool:
    """The constraints of the design, section 2, in the words of it that are about places in the sequence."""
    assert x.num_strata is not None
    whole_entries = {Fraction(t) for t in range(0, x.seq_len + 1, x.window)}
    strata, chunks = cuts(x.seq_len, x.num_strata), cuts(x.seq_len, x.num_chunks)
    budget = Fraction(x.topk, x.num_strata)
    return (
        strata <= whole_entries  # a stratum is whole entries of the coarsest level, so of every level
        and chunks <= strata  # a chunk is whole strata
        and budget.denominator == 1
        and 2 <= budget <= Fraction(x.seq_len, x.num_strata * x.window)  # its coarsest entries
        and (x.dilation is None or all(cut % x.dilation == 0 for cut in chunks))
    )


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


PYRAMIDS = st.sampled_from([(2, 2), (2, 3), (3, 2), (2, 4), (2, 5), (3, 3), (4, 2)])
# Numbers with many divisors, and some that spoil them: of any numbers, hardly any are legal together.
COARSEST = st.sampled_from([1, 4, 6, 7, 8, 12, 18, 24, 36, 48])
CHUNKS = st.sampled_from([1, 2, 3, 4, 5, 6, 8])
TOPK = st.sampled_from([2, 3, 4, 6, 8, 9, 12, 16, 24])


@settings(max_examples=150)
@given(PYRAMIDS, COARSEST, st.sampled_from([0, 0, 0, 1, 2]), CHUNKS, TOPK)
def test_exactly_the_legal_is_accepted(
    pyramid: tuple[int, int], coarsest: int, more: int, num_chunks: int, topk: int
) -> None:
    base = Numbers(coarsest * pyramid[1] ** (pyramid[0] - 1) + more, num_chunks, *pyramid, topk, 1)
    for strata, dilation in itertools.product(range(1, topk + 2), (None, 1, 2, 3, 4)):
        x = base.but(num_strata=strata, dilation=dilation)
        assert x.resolves() == is_legal(x), x


@settings(max_examples=200)
@given(PYRAMIDS, COARSEST, CHUNKS, TOPK, st.sampled_from([None, 2, 3]))
def test_num_strata_left_out_becomes_the_smallest_that_the_design_allows(
    pyramid: tuple[int, int], coarsest: int, num_chunks: int, topk: int, dilation: int | None
) -> None:
    """The smallest multiple of 2 x max_cp (here 1) that is legal on one rank, so the same at every degree."""
    x = Numbers(coarsest * pyramid[1] ** (pyramid[0] - 1), num_chunks, *pyramid, topk, None, dilation)
    derived = next((s for s in range(2, topk, 2) if is_legal(x.but(num_chunks=1, num_strata=s, dilation=None))), None)
    if derived is None or not is_legal(x.but(num_strata=derived)):
        assert not x.resolves()
    else:
        assert x.cfg.resolve(x.seq_len, num_chunks).num_strata == derived
    assert_named_values_are_valid(x)


def legal_strata(x: Numbers) -> list[int]:
    """What `num_strata` could be instead, by the other numbers but the dilation, on which it does not depend."""
    return [strata for strata in range(1, x.topk + 1) if is_legal(x.but(num_strata=strata, dilation=None))]


def assert_named_values_are_valid(x: Numbers) -> None:
    """Those that the error of illegal `x` names, if any."""
    error = x.error() or ""
    if found := re.search(r"; valid: (\[.*\])", error):
        assert ast.literal_eval(found[1]) == legal_strata(x) != []
    if "none is valid" in error:
        assert legal_strata(x) == []
    if x.num_strata is not None and (found := re.search(r"topk .* exceeds the (\d+) coarsest entries", error)):
        assert x.but(topk=int(found[1])).resolves()
    for seq_len in nearest_legal(error):
        assert "nearest legal" not in (x.but(seq_len=seq_len).error() or "")  # of this constraint


def nearest_legal(error: str) -> list[int]:
    found = re.search(r"nearest legal: (.*)", error)
    return [int(number) for number in found[1].split(" or ")] if found else []


@st.composite
def legal(draw: st.DrawFn) -> Numbers:
    """A budget below the coarsest entries of a stratum, so that a step to either side is legal too."""
    levels, p = draw(PYRAMIDS)
    strata = draw(st.sampled_from(range(1, 13)))
    coarsest = draw(st.sampled_from(range(3, 13)))
    topk = strata * draw(st.sampled_from(range(2, coarsest)))
    chunks = draw(st.sampled_from(divisors(strata)))
    return Numbers(strata * coarsest * p ** (levels - 1), chunks, levels, p, topk, strata)


# Each makes of a legal x one that breaks one constraint, and says what the message must say of it; None: not of this x.


def budget_is_not_whole(x: Numbers) -> tuple[Numbers, str] | None:
    wrong = x.topk + 1
    return None if x.num_strata == 1 else (x.but(topk=wrong), f"{x.num_strata} .* does not divide topk {wrong};")


def budget_of_one(x: Numbers) -> tuple[Numbers, str] | None:
    if x.num_strata == 1:
        return None  # topk is at least 2
    return x.but(topk=x.num_strata), "a budget of 1 entry per stratum, fewer than 2"


def budget_above_the_coarsest_entries(x: Numbers) -> tuple[Numbers, str]:
    entries = x.seq_len // x.window
    wrong = entries + (x.num_strata or 1)
    return x.but(topk=wrong), f"topk {wrong} exceeds the {entries} coarsest entries .* must be at most that"


def chunks_are_not_whole_entries(x: Numbers) -> tuple[Numbers, str]:
    wrong, unit = x.seq_len + 1, f"{x.window} tokens in each of {x.num_chunks} chunk"
    return x.but(seq_len=wrong), f"seq_len {wrong} is not a multiple of pooling_factor.* = {unit}"


def strata_are_not_whole_entries(x: Numbers) -> tuple[Numbers, str] | None:
    assert x.num_strata is not None
    wrong = x.seq_len + x.window * x.num_chunks
    if x.num_chunks == x.num_strata:
        return None
    if wrong % x.num_strata:
        return x.but(seq_len=wrong), f"num_strata {x.num_strata} is not legal: it does not divide seq_len {wrong} "
    return x.but(seq_len=wrong), f"stratum of {wrong // x.num_strata} tokens is not a multiple of {x.window} "


def chunks_are_not_whole_strata(x: Numbers) -> tuple[Numbers, str] | None:
    assert x.num_strata is not None
    wrong = [c for c in divisors(x.seq_len // x.window) if x.num_strata % c]
    if not wrong:
        return None
    return x.but(num_chunks=wrong[0]), f"not divide evenly over the {wrong[0]} chunks .*whole number of strata"


def chunks_are_not_whole_dilations(x: Numbers) -> tuple[Numbers, str]:
    chunk = x.seq_len // x.num_chunks
    wrong = next(d for d in itertools.count(2) if chunk % d)
    return x.but(dilation=wrong), f"dilation {wrong} does not divide the chunk of {chunk} tokens"


Violation = Callable[[Numbers], tuple[Numbers, str] | None]
VIOLATIONS: list[Violation] = [
    budget_is_not_whole,
    budget_of_one,
    budget_above_the_coarsest_entries,
    chunks_are_not_whole_entries,
    strata_are_not_whole_entries,
    chunks_are_not_whole_strata,
    chunks_are_not_whole_dilations,
]


@pytest.mark.parametrize("violation", VIOLATIONS)
@settings(max_examples=50)
@given(x=legal())
def test_error_names_the_constraint_and_values_that_resolve(violation: Violation, x: Numbers) -> None:
    assert x.resolves()
    broken = violation(x)
    assume(broken is not None)
    assert broken is not None
    wrong, message = broken
    assert not is_legal(wrong)
    assert re.search(message, wrong.error() or ""), wrong.error()
    assert_named_values_are_valid(wrong)


def test_the_nearest_legal_lengths_resolve() -> None:
    x = Numbers(seq_len=33, num_chunks=1, num_levels=2, pooling_factor=4, topk=8, num_strata=2)
    named = nearest_legal(x.error() or "")
    assert named
    assert [seq_len for seq_len in named if not x.but(seq_len=seq_len).resolves()] == []


def test_topk_is_not_said_to_be_what_it_is() -> None:
    error = Numbers(seq_len=64, num_chunks=4, num_levels=2, pooling_factor=4, topk=4, num_strata=4).error() or ""
    assert "none is valid" in error
    assert "topk should be a multiple of the chunks" not in error


@settings(max_examples=80)
@given(legal(), st.sampled_from([None, 1, 2, 3, 4]), st.sampled_from([0.3, 0.9, 1, 1.3, 2]), st.integers(0, 20))
def test_padded_length_is_the_least_legal_of_the_finest_layout(
    x: Numbers, dilation: int | None, times: float, more: int
) -> None:
    assert x.num_strata is not None
    finest = x.but(num_chunks=x.num_strata, dilation=dilation)
    tokens = int(times * x.seq_len) + more
    length = finest.cfg.padded_length(tokens)
    if tokens % x.num_strata == 0 and is_legal(x.but(num_chunks=1, dilation=dilation, seq_len=tokens)):
        assert length == tokens  # of whole strata, though not of whole dilations in each: is not made longer, either
        return
    padded = finest.but(seq_len=length)
    if length < x.topk * x.window:
        assert "exceeds the" in (padded.error() or "")  # a sequence is not made longer for the sake of topk
        padded = padded.but(topk=2 * x.num_strata)
    if length < 2 * x.num_strata * x.window:
        return
    assert length == next(n for n in itertools.count(tokens) if is_legal(padded.but(seq_len=n)))
    for num_chunks in divisors(x.num_strata):
        assert padded.but(num_chunks=num_chunks).resolves()


@given(st.sampled_from([(2, 2), (2, 3), (3, 2)]), st.integers(2, 40), st.integers(2, 60), st.sampled_from([None, 2, 3]))
def test_padded_length_where_num_strata_is_derived(
    pyramid: tuple[int, int], topk: int, windows: int, dilation: int | None
) -> None:
    x = Numbers(windows * pyramid[1] ** (pyramid[0] - 1) - 1, 1, *pyramid, topk, None, dilation)
    assume(topk % 2 == 0 and topk >= 4)
    length = x.cfg.padded_length(x.seq_len)
    assume(topk <= length // x.window)
    layouts = [x.but(num_chunks=num_chunks) for num_chunks in (1, 2)]  # up to 2 x max_cp
    fitting = (n for n in itertools.count(x.seq_len) if all(layout.but(seq_len=n).resolves() for layout in layouts))
    assert length == next(n for n in fitting)
    assert x.cfg.resolve(length).padded_length(x.seq_len) == length


def test_padded_length_is_the_same_once_num_strata_is_derived() -> None:
    x = Numbers(792, num_chunks=1, num_levels=2, pooling_factor=2, topk=384, num_strata=None, dilation=4)
    length = x.cfg.padded_length(x.seq_len)
    assert x.cfg.resolve(length).padded_length(x.seq_len) == length
