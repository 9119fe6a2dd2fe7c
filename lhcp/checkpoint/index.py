"""`index.json` of a checkpoint: which chunk of which tensor is in which file. Imports no torch."""

from __future__ import annotations

from pydantic import TypeAdapter

from lhcp.checkpoint.manifest import INDEX_FILE, Checkpoint, FileName
from lhcp.config import Section


class Chunk(Section):
    """A box of a tensor; in its file it has the tensor's name."""

    file: FileName
    offset: tuple[int, ...]
    size: tuple[int, ...]


class TensorEntry(Section):
    """One tensor: its chunks are disjoint and cover it."""

    dtype: str
    """Name in torch, such as `float32`."""
    shape: tuple[int, ...]
    chunks: list[Chunk]


TensorIndex = dict[str, TensorEntry]
_ADAPTER: TypeAdapter[TensorIndex] = TypeAdapter(TensorIndex)


def dump_index(index: TensorIndex) -> bytes:
    """As the content of `index.json`."""
    return _ADAPTER.dump_json(index)


def read_index(checkpoint: Checkpoint) -> TensorIndex:
    """The tensors of a checkpoint.

    Raises:
        DamagedError: `index.json` is not what was written.
    """
    checkpoint.verify([INDEX_FILE])
    return _ADAPTER.validate_json((checkpoint.folder / INDEX_FILE).read_bytes())
