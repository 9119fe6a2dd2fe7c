"""The byte-level tokenizer: a token is a byte of UTF-8, plus one token that ends a document."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class ByteTokenizer:
    """Tokens 0 to 255 are bytes; 256 (`eos_id`) ends a document."""

    name = "byte"
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str | bytes) -> NDArray[np.uint16]:
        """Token ids, uint16 [number of bytes], without `eos_id`; lone surrogates of a str are kept."""
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        return np.frombuffer(raw, dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: NDArray[np.integer] | Sequence[int]) -> str:
        """Text of token ids [n]: `eos_id` gives nothing, bytes that are no UTF-8 give U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        array = np.asarray(ids, dtype=np.int64)
        outside = array[(array < 0) | (array >= self.vocab_size)]
        if outside.size:
            raise ValueError(f"token id {outside[0]} is outside the byte vocabulary, 0 to {self.vocab_size - 1}")
        raw = bytes(array[array != self.eos_id].astype(np.uint8))
        return raw.decode("utf-8", "replace")
