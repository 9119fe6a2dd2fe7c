"""Writes one split of a dataset as shards of a fixed number of tokens."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
from numpy.typing import NDArray

from lhcp.data.index import TOKEN_DTYPE, Shard, SplitIndex, SplitName

SHARD_NAME = re.compile(r"(train|held_out)-\d{5,}\.bin")


class ShardWriter:
    """Appends documents to `folder`/`split`-00000.bin, -00001.bin ...; a document may cross shards.

    A context manager: leaving it closes the open file. `finish` gives the index entry.
    """

    def __init__(self, folder: Path, split: SplitName, shard_tokens: int) -> None:
        """`shard_tokens`: tokens of every shard but the last, which may have fewer."""
        assert shard_tokens >= 1, shard_tokens
        self._folder = folder
        self._split = split
        self._shard_tokens = shard_tokens
        self._shards: list[Shard] = []
        self._documents = 0
        self._text_bytes = 0
        self._file: IO[bytes] | None = None
        self._file_tokens = 0
        self._hash = hashlib.sha256()

    def __enter__(self) -> Self:
        """Nothing is opened before the first document."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the open file, if any."""
        if self._file is not None:
            self._file.close()

    def append(self, tokens: NDArray[np.uint16], *, text_bytes: int) -> None:
        """Add one document: uint16 [n], and the bytes of text that these tokens stand for."""
        self._documents += 1
        self._text_bytes += text_bytes
        while len(tokens):
            if self._file is None:
                self._file = (self._folder / self._next_name()).open("wb")
            piece = tokens[: self._shard_tokens - self._file_tokens]
            data = piece.astype(TOKEN_DTYPE, copy=False).tobytes()
            self._file.write(data)
            self._hash.update(data)
            self._file_tokens += len(piece)
            tokens = tokens[len(piece) :]
            if self._file_tokens == self._shard_tokens:
                self._close_shard(self._file)

    def finish(self) -> SplitIndex:
        """Close the last shard and describe all of them."""
        if self._file is not None:
            self._close_shard(self._file)
        return SplitIndex(shards=self._shards, documents=self._documents, text_bytes=self._text_bytes)

    def _next_name(self) -> str:
        return f"{self._split}-{len(self._shards):05d}.bin"

    def _close_shard(self, file: IO[bytes]) -> None:
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
        file.close()
        self._shards.append(
            Shard(file=self._next_name(), tokens=self._file_tokens, bytes=size, sha256=self._hash.hexdigest())
        )
        self._file, self._file_tokens, self._hash = None, 0, hashlib.sha256()
