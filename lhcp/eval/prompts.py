"""Passkey prompts: a digit hidden in noise, and the question for it. Imports no torch.

After Mohtashami and Jaggi (arXiv:2305.16300): the answer is nowhere but in the one sentence that states it. Here the
question repeats that sentence as far as the digit, so that a model without instructions can answer it by copying.
"""

from __future__ import annotations

import string

import numpy as np
from numpy.typing import NDArray

from lhcp.config import ConfigError
from lhcp.data import ByteTokenizer

QUESTION = "\nThe pass key is "
STATEMENT = QUESTION + "{digit}. Remember it. {digit} is the pass key.\n"
DEPTHS = (0.0, 15.0, 30.0, 50.0, 70.0, 85.0, 100.0)
"""Where the statement stands: per cent of the noise before it."""
DIGIT_TOKENS = tuple(int(token) for token in ByteTokenizer().encode(string.digits))
_NOISE = ByteTokenizer().encode(string.ascii_letters + string.digits)
SHORTEST = len(QUESTION) + len(STATEMENT.format(digit=0))
"""Tokens of a prompt without noise."""


def noise(generator: np.random.Generator, count: int) -> NDArray[np.int64]:
    """Alphanumeric tokens, each drawn on its own: int64 [count]."""
    return _NOISE[generator.integers(len(_NOISE), size=count)].astype(np.int64)


def passkey_prompts(context: int, depth: float, samples: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Byte-level prompts of one length and depth: the token after them should be the digit.

    The same arguments give the same prompts. Each digit is the answer equally often, as far as `samples` allows, so
    that one answer to all scores a tenth.

    Args:
        context: tokens of a prompt, the question included.
        depth: per cent of the noise that precedes the statement.
        samples: prompts.
        seed: of noise and digits.

    Returns:
        tokens, int64 [samples, context], and digits, int64 [samples], 0 to 9.

    Raises:
        ConfigError: `context` is too short for statement and question.
    """
    assert 0 <= depth <= 100, depth
    if context < SHORTEST:
        raise ConfigError(f"context {context}: a passkey prompt has at least {SHORTEST} tokens")
    generator = np.random.default_rng([seed, context, round(1000 * depth)])
    digits = generator.permutation(np.arange(samples) % 10)
    count = context - SHORTEST
    before = round(count * depth / 100)
    encode = ByteTokenizer().encode
    prompts = []
    for digit in digits:
        filler = noise(generator, count)
        statement = encode(STATEMENT.format(digit=digit))
        prompts.append(np.concatenate([filler[:before], statement, filler[before:], encode(QUESTION)]))
    return np.asarray(prompts, dtype=np.int64).reshape(samples, context), digits
