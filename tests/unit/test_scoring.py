"""The dilated scorer against its definition in loops, and shapes that do not fit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lhcp.attention import LighthouseConfig, lighthouse_attention, select, select_from_scores
from lhcp.attention.scoring import dilated_rows
from lhcp.config import ConfigError
from lhcp.distributed import ContextParallel
from lhcp.kernels.lighthouse import reference

N, HEADS, KV_HEADS, WIDTH, DILATION = 48, 4, 2, 5, 4


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, N, h, WIDTH, dtype=torch.float64, generator=generator) for h in (HEADS, 2, 2))
    return q, k, v


def attend_in_loops(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of [n, D] rows, each to its own n."""
    rows = []
    for t in range(len(queries)):
        weights = (queries[t] @ keys[: t + 1].T / math.sqrt(WIDTH)).softmax(-1)
        rows.append(weights @ values[: t + 1])
    return torch.stack(rows)


def dilated_scores(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    return [reference.row_norms(x, KV_HEADS) for x in dilated_rows(q, k, v, DILATION, ContextParallel())]


def test_dilated_scores_are_their_definition() -> None:
    """Tokens of equal remainder mod 4 attend among themselves, per query head; a KV head stacks its heads' rows."""
    q, k, v = tensors()
    squares = torch.zeros(2, 2, KV_HEADS, N, dtype=torch.float64)  # query and key scores
    for b in range(2):
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            for start in range(DILATION):
                rows = (x[b, start::DILATION] for x in (q[:, :, head], k[:, :, group], v[:, :, group]))
                queries, keys, values = rows
                out = attend_in_loops(queries, keys, values)
                squares[0, b, group, start::DILATION] += out.square().sum(-1)
                swapped = attend_in_loops(keys, queries, values)
                squares[1, b, group, start::DILATION] += swapped.square().sum(-1)
    for scores, expected in zip(dilated_scores(q, k, v), squares, strict=True):
        torch.testing.assert_close(scores, expected.sqrt(), rtol=1e-12, atol=0)


def test_scorer_dilated_is_used() -> None:
    config = LighthouseConfig(num_levels=2, pooling_factor=2, topk=8, num_strata=2, scorer="dilated")
    q, k, v = tensors()
    expected = select_from_scores(*dilated_scores(q, k, v), config)
    assert torch.equal(select(q, k, config, v=v).entries, expected.entries)
    by_norm = select(q, k, config.model_copy(update={"scorer": "norm"}))
    assert not torch.equal(by_norm.entries, expected.entries)
    with pytest.raises(ConfigError, match="scorer 'dilated' needs v"):
        select(q, k, config)


def test_shapes_that_do_not_fit_are_named() -> None:
    config = LighthouseConfig(num_levels=2, pooling_factor=2, topk=8, num_strata=2)
    q, k, v = tensors()
    for wrong in [(q[:, :, :3], k, v), (q, k, v[:, :, :0]), (q, k.float(), v), (q, k[:, :24], v[:, :24]), (q[0], k, v)]:
        with pytest.raises(ConfigError, match=r"k and v must be \[B, N, G, D\]"):
            lighthouse_attention(*wrong, config)


def test_equal_rows_tie_whatever_their_strides() -> None:
    config = LighthouseConfig(num_levels=2, pooling_factor=2, topk=8, num_strata=2)
    row = torch.randn(1, 1, 1, 208).expand(1, N, 1, 208)
    strided = row.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # N innermost
    assert torch.equal(select(strided, strided, config).entries, select(row, row, config).entries)
