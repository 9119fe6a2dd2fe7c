"""Details of the kernels' specification that whole-layer tolerances would hide."""

from __future__ import annotations

import torch

from lhcp.kernels.lighthouse import reference


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
    out = reference.scatter_back(rows, sizes, 2, 2, before)
    assert torch.equal(out, expected.bfloat16())


def test_negative_zero_ties_with_zero() -> None:
    zeros = torch.tensor([0.0, -0.0, 1e-45])
    for scores in (zeros, zeros.double()):
        bits = reference.score_bits(scores).tolist()
        assert bits[0] == bits[1] == 0 < bits[2]
