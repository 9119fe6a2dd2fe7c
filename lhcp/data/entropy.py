"""Empirical entropies of a token stream: what a model that knows no, or one, preceding token could reach."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def unigram_entropy(tokens: NDArray[np.integer]) -> float:
    """H(x_t) of tokens [n], n >= 1, in nats per token.

    Raises:
        ValueError: there are too few tokens.
    """
    if len(tokens) < 1:
        raise ValueError("the entropy of no tokens is not defined")
    return _entropy(np.unique(tokens, return_counts=True)[1])


def bigram_entropy(tokens: NDArray[np.integer]) -> float:
    """H(x_t | x_{t-1}) over the n - 1 adjacent pairs of tokens [n], n >= 2, in nats per token.

    By the chain rule, H(x_{t-1}, x_t) - H(x_{t-1}).

    Raises:
        ValueError: there are too few tokens.
    """
    if len(tokens) < 2:
        raise ValueError("the entropy of a token given the one before needs two tokens")
    values, ranks = np.unique(tokens, return_inverse=True)
    first, second = ranks[:-1], ranks[1:]
    pairs = first * len(values) + second
    joint = _entropy(np.unique(pairs, return_counts=True)[1])
    # The chain rule rounds: a deterministic stream must not give -1e-16.
    return max(0.0, joint - _entropy(np.bincount(first)))


def _entropy(counts: NDArray[np.integer]) -> float:
    shares = counts[counts > 0] / counts.sum()
    return max(0.0, float(-(shares * np.log(shares)).sum()))
