"""Reads a prepared dataset: one split as a single stream of tokens, or every shard against its checksum."""

from __future__ import annotations

import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lhcp.config import ConfigError
from lhcp.data.index import AGAIN, TOKEN_DTYPE, SplitName, read_index
from lhcp.files import DamagedError, check_file


def verify_shards(path: Path, part: int = 0, parts: int = 1) -> None:
    """Read shards of the dataset in folder `path` whole, and compare them with the checksums in its index.

    Args:
        path: the folder.
        part: which share, in [0, parts): of all splits' shards in a row, those number `part` modulo `parts`.
        parts: readers that share the work, such as the ranks of a run.

    Raises:
        ConfigError: there is no dataset.
        DamagedError: naming the first file that is missing or is not what was written.
    """
    assert 0 <= part < parts, (part, parts)
    shards = [shard for _, split in sorted(read_index(path).splits.items()) for shard in split.shards]
    for shard in shards[part::parts]:
        try:
            check_file(path / shard.file, shard.bytes, shard.sha256)
        except DamagedError as error:
            raise DamagedError(f"{error}; {AGAIN}") from None


class TokenDataset:
    """The tokens of one split, memory-mapped: a shard is mapped when it is first read."""

    def __init__(self, path: Path, split: SplitName) -> None:
        """Open the dataset in folder `path`.

        Raises:
            ConfigError: there is no dataset, it has no such split, or its files disagree with its index.
        """
        self.path = path
        self.split = split
        self.index = read_index(path)
        entry = self.index.splits.get(split)
        if entry is None or not entry.shards:
            raise ConfigError(
                f"the dataset in {path} has no {split} split; make it again with `lhcp data prepare` and a "
                f"--held-out above 0"
            )
        self._shards = entry.shards
        self._ends = list(accumulate(shard.tokens for shard in entry.shards))
        self._maps: dict[int, NDArray[np.uint16]] = {}
        for shard in entry.shards:
            file = path / shard.file
            expected = shard.tokens * np.dtype(TOKEN_DTYPE).itemsize
            if not file.is_file():
                raise ConfigError(f"{file} is missing, but the dataset's index lists it; {AGAIN}")
            if not os.access(file, os.R_OK):
                raise ConfigError(f"{file} cannot be read: no permission")
            if (size := file.stat().st_size) != expected:
                raise ConfigError(f"{file} has {size} bytes, but the dataset's index says {expected}; {AGAIN}")

    @property
    def num_tokens(self) -> int:
        """Tokens of the split."""
        return self._ends[-1]

    @property
    def vocab_size(self) -> int:
        """Every token is in [0, vocab_size)."""
        return self.index.vocab_size

    @property
    def fingerprint(self) -> str:
        """Identifies the dataset (all splits): sha256 in hex. See `DatasetIndex.fingerprint`."""
        return self.index.fingerprint

    def num_sequences(self, seq_len: int) -> int:
        """Whole sequences of `seq_len` tokens that each have a next token as their last label."""
        assert seq_len >= 1, seq_len
        return (self.num_tokens - 1) // seq_len

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of the stream, int64 [stop - start]; may cross shards.

        Raises:
            IndexError: the range is not inside the split.
            ConfigError: a shard is damaged: it holds a token that is not in the vocabulary.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) are not inside the {self.num_tokens} of {self.split}")
        out = np.empty(stop - start, dtype=np.int64)
        number = bisect_right(self._ends, start)
        done = 0
        while done < len(out):
            first = start + done - (self._ends[number] - self._shards[number].tokens)
            piece = self._map(number)[first : first + len(out) - done]
            if piece.max() >= self.vocab_size:
                file = self.path / self._shards[number].file
                raise ConfigError(f"{file} holds token {piece.max()}, beyond its vocabulary; {AGAIN}")
            out[done : done + len(piece)] = piece
            done += len(piece)
            number += 1
        return out

    def _map(self, number: int) -> NDArray[np.uint16]:
        if number not in self._maps:
            self._maps[number] = np.memmap(self.path / self._shards[number].file, dtype=TOKEN_DTYPE, mode="r")
        return self._maps[number]
