"""Details of the kernels' specification that whole-layer tolerances would hide."""

from __future__ import annotations

import math

import torch

from lhcp.kernels.lighthouse import PyramidShape, reference


def test_a_position_sums_its_rows_before_it_rounds() -> None:
    """L=3, p=2 over two chunks of 8 tokens: loops in float64, rounded to bfloat16 once."""
    generator = torch.Generator().manual_seed(0)
    sizes, chunk_len = [16, 8, 4], 8
    rows = torch.randn(1, sum(sizes), 2, 64, generator=generator).bfloat16()
    before = torch.randn(2, 2, 1, 2, 64, generator=generator)  # chunk, level - 1
    levels = [level.double() for level in rows.split(sizes, dim=1)]
    expected = torch.zeros(1, 16, 2, 64, dtype=torch.float64)
    for t in range(16):
        chunk, inside = divmod(t, chunk_len)
        expected[:, t] += levels[0][:, t]
        for level in (1, 2):
            entry = (inside + 1) // 2**level - 1
            per_chunk = chunk_len // 2**level
            expected[:, t] += before[chunk, level - 1] if entry < 0 else levels[level][:, chunk * per_chunk + entry]
    every_row = torch.arange(sum(sizes), dtype=torch.int32).expand(1, 1, -1)  # gathered all, so slots are rows
    out = reference.scatter_back(rows, every_row, every_row, PyramidShape(16, 3, 2), 2, before)
    assert torch.equal(out, expected.bfloat16())


def test_signs_do_not_count() -> None:
    """-0.0 ties with 0, and a NaN lies above inf whatever its sign."""
    for dtype in (torch.float32, torch.float64):
        scores = torch.tensor([0.0, -0.0, 1e-45, math.inf, math.nan, -math.nan], dtype=dtype).repeat_interleave(2)
        bits = reference.score_bits(scores.view(1, 1, -1), PyramidShape(12, 2, 2)).flatten().tolist()
        assert bits[0] == bits[1] == 0 < bits[2] < bits[3] < bits[4] == bits[5]
