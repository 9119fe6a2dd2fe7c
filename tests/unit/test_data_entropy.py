"""Entropies against values worked out by hand."""

from __future__ import annotations

from math import log

import numpy as np
import pytest

from lhcp.data import bigram_entropy, unigram_entropy


def test_by_hand() -> None:
    tokens = np.array([0, 0, 1, 0, 2, 0, 1, 0, 300], dtype=np.uint16)
    # Five 0, two 1, one 2, one 300.
    assert unigram_entropy(tokens) == pytest.approx((5 * log(9 / 5) + 2 * log(9 / 2) + 2 * log(9)) / 9, rel=1e-14)
    # After 0 (five times): 0, 1 twice, 2, 300. After 1 and 2 (three times): always 0.
    assert bigram_entropy(tokens) == pytest.approx((3 * log(5) + 2 * log(5 / 2)) / 8, rel=1e-14)


def test_constant_and_alternating() -> None:
    assert unigram_entropy(np.zeros(10, dtype=np.int64)) == 0
    assert bigram_entropy(np.zeros(10, dtype=np.int64)) == 0
    alternating = np.arange(1001) % 3
    assert unigram_entropy(alternating) == pytest.approx(log(3), abs=1e-5)
    assert bigram_entropy(alternating) == pytest.approx(0, abs=1e-12)
    assert bigram_entropy(alternating) >= 0


def test_independent_tokens() -> None:
    tokens = np.random.default_rng(0).integers(0, 8, 200_000).astype(np.uint16)
    assert unigram_entropy(tokens) == pytest.approx(log(8), abs=1e-3)
    assert bigram_entropy(tokens) == pytest.approx(log(8), abs=1e-3)


def test_too_short() -> None:
    with pytest.raises(ValueError, match="entropy of no tokens"):
        unigram_entropy(np.zeros(0, dtype=np.int64))
    with pytest.raises(ValueError, match="needs two tokens"):
        bigram_entropy(np.zeros(1, dtype=np.int64))
