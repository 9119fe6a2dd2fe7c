"""However many blocks are merged or added at once, the result is that of all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lhcp.distributed.exchange import merge
from lhcp.distributed.exchange.merge import Merge, Part, Sum

BATCH, ROWS, HEADS, WIDTH, BLOCKS = 2, 12, 4, 3, 13
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""The last is half a unit of the last place, of the result alone: what is so far is in float32."""


@pytest.fixture(params=[1, 2, 5, 100])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "AT_ONCE", request.param)


def blocks(dtype: torch.dtype, rows: slice, heads: slice, *of: int) -> Tensor:
    """Random normal: [BLOCKS, B, n, h, ...]."""
    n, h = len(range(ROWS)[rows]), len(range(HEADS)[heads])
    return torch.randn(BLOCKS, BATCH, n, h, *of, generator=torch.Generator().manual_seed(n + h)).to(dtype)


def close(value: Tensor, expected: Tensor) -> None:
    assert (value.double() - expected).norm() <= TOLERANCE[value.dtype] * expected.norm()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_sums(dtype: torch.dtype) -> None:
    """Of blocks of all rows, of later rows, and of some heads."""
    like = torch.empty(BATCH, ROWS, HEADS, WIDTH, dtype=dtype)
    total, expected = Sum(like), torch.zeros(like.shape, dtype=torch.float64)
    everything, later, some = slice(0, None), slice(ROWS // 2, None), slice(1, 3)
    kinds = ((everything, everything), (later, everything), (everything, some))
    drawn = [blocks(dtype, rows, heads, WIDTH) for rows, heads in kinds]
    for block in range(BLOCKS):
        rows, heads = kinds[block % 3]
        x = drawn[block % 3][block]
        total.add(x, rows, heads)
        expected[:, rows, heads] += x
    result = total.result()
    assert result.dtype == dtype
    close(result, expected)


def test_a_sum_of_nothing_is_zero() -> None:
    assert not Sum(torch.ones(1, 2, 3, 4)).result().any()


def test_a_sum_may_be_put_where_its_first_part_is() -> None:
    for dtype in TOLERANCE:
        x = torch.full((1, 2, 1, 2), 3.0, dtype=dtype)
        merge.add(x, [Part(x), Part(torch.ones_like(x))])
        assert (x == 4).all()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_outputs(dtype: torch.dtype) -> None:
    """Of blocks of all rows, which the first has, and of later ones."""
    like = torch.empty(BATCH, ROWS, HEADS, WIDTH, dtype=dtype)
    accumulated = torch.promote_types(dtype, torch.float32)
    merged = Merge(like)
    weighted, weights = (torch.zeros(*like.shape[:3], of, dtype=torch.float64) for of in (WIDTH, 1))
    for block in range(BLOCKS):
        rows = slice(ROWS // 2 if block % 2 else 0, None)
        out = blocks(dtype, rows, slice(0, None), WIDTH)[block]
        lse = 3 * blocks(accumulated, rows, slice(0, None))[block].transpose(1, 2)
        merged.add(out, lse, rows)
        weight = lse.double().exp().transpose(1, 2).unsqueeze(-1)
        weighted[:, rows] += weight * out
        weights[:, rows] += weight
    value, value_lse = merged.result()
    assert (value.dtype, value_lse.dtype) == (dtype, accumulated)
    close(value, weighted / weights)
    close(value_lse, weights.log().squeeze(-1).transpose(1, 2))
