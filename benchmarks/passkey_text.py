"""Text with passkeys in it, for models to learn from what `lhcp eval passkey` asks: JSON lines, a document each.

    python -m benchmarks.passkey_text --out FILE.jsonl --tokens 30000000 [--longest 16384] [--seed 1]

A document is alphanumeric noise in which the same digit is stated twice or more often, the last time at its end. Its
length and the tokens to a statement are drawn so that there is as much of every size: some documents state it often
enough to learn from, others twice, far apart. Noise and digits are drawn anew for each, from another seed than the
evaluation's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lhcp.data import ByteTokenizer
from lhcp.eval.prompts import STATEMENT, noise

SHORTEST = 128
"""Tokens of a document."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.passkey_text", description="Text with passkeys in it.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, required=True, help="bytes of text, at least")
    parser.add_argument("--longest", type=int, default=16_384, help="bytes of a document, at most")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if args.longest < SHORTEST:
        parser.error(f"--longest {args.longest}: must be at least {SHORTEST}")
    generator = np.random.default_rng([args.seed, 0x9A55])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    written = 0
    with args.out.open("w", encoding="utf-8") as file:
        while written < args.tokens:
            text = document(generator, args.longest)
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text)
    return 0


def document(generator: np.random.Generator, longest: int) -> str:
    """One document of `SHORTEST` to `longest` bytes, which all octaves of lengths have as many tokens of."""
    length = round(1 / generator.uniform(1 / longest, 1 / SHORTEST))
    statement = STATEMENT.format(digit=generator.integers(10))
    count = max(2, length // _log_uniform(generator, len(statement), length))
    filler = ByteTokenizer().decode(noise(generator, length - count * len(statement)))
    places = sorted(int(place) for place in generator.integers(len(filler) + 1, size=count - 1))
    parts = [filler[lo:hi] for lo, hi in zip([0, *places], [*places, len(filler)], strict=True)]
    return statement.join(parts) + statement


def _log_uniform(generator: np.random.Generator, least: int, most: int) -> int:
    return round(float(np.exp(generator.uniform(np.log(least), np.log(most)))))


if __name__ == "__main__":
    sys.exit(main())
