"""Passkey prompts, and the text that teaches what they ask."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import passkey_text
from lhcp.config import ConfigError
from lhcp.data import ByteTokenizer
from lhcp.eval.prompts import DEPTHS, DIGIT_TOKENS, QUESTION, SHORTEST, STATEMENT, passkey_prompts


@pytest.mark.parametrize("context", [SHORTEST, SHORTEST + 1, 100, 333])
@pytest.mark.parametrize("depth", [*DEPTHS, 33.3])
def test_prompts(context: int, depth: float) -> None:
    tokens, digits = passkey_prompts(context, depth, 20, seed=3)
    assert tokens.shape == (20, context)
    assert tokens.dtype == np.int64
    assert sorted(digits.tolist()) == sorted([*range(10)] * 2)
    for prompt, digit in zip(tokens, digits, strict=True):
        text = ByteTokenizer().decode(prompt)
        before, found, after = re.fullmatch(rf"([A-Za-z0-9]*){STATED}([A-Za-z0-9]*)\nThe pass key is ", text).groups()  # type: ignore[union-attr]
        assert int(found) == digit
        assert text[-len(QUESTION) :] + DIGITS[digit] == STATEMENT.format(digit=digit)[: len(QUESTION) + 1]
        assert len(before) == round((context - SHORTEST) * depth / 100)
        assert len(before) + len(after) == context - SHORTEST


DIGITS = "0123456789"
STATED = r"\nThe pass key is (?P<digit>\d)\. Remember it\. (?P=digit) is the pass key\.\n"


def test_digit_tokens() -> None:
    assert ByteTokenizer().decode(DIGIT_TOKENS) == DIGITS


def test_prompts_depend_on_their_arguments_alone() -> None:
    tokens, digits = passkey_prompts(200, 30, 10, seed=0)
    again, same = passkey_prompts(200, 30, 10, seed=0)
    assert (tokens == again).all()
    assert (digits == same).all()
    assert len({row.tobytes() for row in tokens}) == 10
    for other in (passkey_prompts(200, 30, 10, seed=1), passkey_prompts(200, 15, 10, seed=0)):
        assert not (tokens == other[0]).all()


def test_a_prompt_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"context {SHORTEST - 1}: .* at least {SHORTEST} tokens"):
        passkey_prompts(SHORTEST - 1, 50, 1, seed=0)


def test_text_with_passkeys(tmp_path: Path) -> None:
    file = tmp_path / "new" / "keys.jsonl"
    assert passkey_text.main(["--out", str(file), "--tokens", "60000", "--longest", "2000"]) == 0
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    assert 60_000 <= sum(map(len, texts)) < 62_000
    counts, digits = set(), set()
    for text in texts:
        found = re.findall(STATED, text)
        assert len(set(found)) == 1  # of one document: the first cannot be known, the others can
        assert text.endswith(STATEMENT.format(digit=found[0]))
        assert re.fullmatch(r"[A-Za-z0-9]*", re.sub(STATED, "", text))
        assert passkey_text.SHORTEST <= len(text) <= 2_000
        counts.add(len(found))
        digits.add(found[0])
    assert {2, 3, 4, 5} < counts
    lengths = np.array([len(text) for text in texts])
    short = lengths[lengths < 506].sum() / lengths.sum()  # half of the octaves from 128 to 2,000
    assert 0.4 < short < 0.6
    assert digits == set(DIGITS)
    assert len(set(texts)) == len(texts)
