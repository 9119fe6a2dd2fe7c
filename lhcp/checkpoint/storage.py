"""Checkpoints as torch.distributed.checkpoint (DCP) reads and writes them: safetensors files and JSON, no pickle.

DCP plans which rank writes which chunk and which chunks a rank needs; here are only files. Its own file format keeps
its index in a pickle, and its Hugging Face format has no checksums and no index at all.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from lhcp.checkpoint.folder import unpublished
from lhcp.checkpoint.index import Chunk, TensorEntry, TensorIndex, dump_index, read_index
from lhcp.checkpoint.manifest import INDEX_FILE, MANIFEST_FILE, Checkpoint, FileEntry, Manifest
from lhcp.files import sha256_of, sync_folder, write_checked


class CheckpointWriter(StorageWriter):
    """Writes a checkpoint into a hidden folder, which the coordinator renames when all of it is on the disk.

    Args:
        folder: the checkpoint; its parent must exist and it must not.
        rank: of this process, for its file's name.
        manifest: without `files`.
        on_published: called on the coordinator.
    """

    def __init__(
        self, folder: Path, rank: int, manifest: Manifest, on_published: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__()
        self._folder, self._rank, self._manifest, self._on_published = folder, rank, manifest, on_published
        self._unpublished = unpublished(folder)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do: a writer serves one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The coordinator makes the folder: it plans before any rank writes."""
        if is_coordinator:
            if self._folder.exists():
                raise FileExistsError(f"{self._folder} exists")
            if self._unpublished.exists():  # of a failed attempt
                shutil.rmtree(self._unpublished)
            self._unpublished.mkdir()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """As planned."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """One file with this rank's chunks; none when it has none."""
        done: Future[list[WriteResult]] = Future()
        tensors: dict[str, Tensor] = {}
        for item in plan.items:
            chunk = planner.resolve_data(item)
            assert isinstance(chunk, Tensor), f"{item.index.fqn} is not a tensor"
            assert item.index.fqn not in tensors, f"two chunks of {item.index.fqn} on one rank"
            if chunk.numel():
                tensors[item.index.fqn] = chunk.detach().contiguous()
        results = []
        if tensors:
            path = self._unpublished / f"rank-{self._rank:05d}.safetensors"
            save_file(tensors, path)
            path.chmod(self._unpublished.stat().st_mode & 0o666)  # else readable by the owner alone, whatever the umask
            written = _synced_entry(path)
            results = [
                WriteResult(item.index, size_in_bytes=tensors[item.index.fqn].nbytes, storage_data=(path.name, written))
                for item in plan.items
                if item.index.fqn in tensors
            ]
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write index and manifest, and publish."""
        written = [result for rank in results for result in rank]
        index = self._unpublished / INDEX_FILE
        index.write_bytes(dump_index(_make_index(metadata, written)))
        files = dict(result.storage_data for result in written) | {INDEX_FILE: _synced_entry(index)}
        manifest = self._manifest.model_copy(update={"files": files})
        write_checked(self._unpublished / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")
        sync_folder(self._unpublished)
        self._unpublished.rename(self._folder)
        sync_folder(self._folder.parent)
        self._on_published()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Checkpoints have no id but their folder."""
        return False


class CheckpointReader(StorageReader):
    """Reads the chunks that a rank needs. Verifies nothing but the index: see `Checkpoint.verify`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder = checkpoint.folder
        self._index = read_index(checkpoint)
        self._files = {
            MetadataIndex(name, chunk.offset): chunk.file
            for name, entry in self._index.items()
            for chunk in entry.chunks
        }

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do: a reader serves one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in DCP's words."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=getattr(torch, entry.dtype)),
                    torch.Size(entry.shape),
                    [ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.size)) for chunk in entry.chunks],
                )
                for name, entry in self._index.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy each needed part of each chunk into the tensor that wants it."""
        by_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            by_file[self._files[item.storage_index]].append(item)
        for name, items in by_file.items():
            with safe_open(self._folder / name, framework="pt") as file:
                for item in items:
                    box = tuple(slice(lo, lo + n) for lo, n in zip(item.storage_offsets, item.lengths, strict=True))
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(file.get_slice(item.storage_index.fqn)[box])
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Checkpoints have no id but their folder."""
        return False


def read_tensor(checkpoint: Checkpoint, index: TensorIndex, name: str) -> Tensor:
    """One whole tensor of a checkpoint, on the CPU; nothing else is read.

    Raises:
        KeyError: there is no such tensor in `index`, which is `read_index(checkpoint)`.
    """
    entry = index[name]
    whole = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
    for chunk in entry.chunks:
        with safe_open(checkpoint.folder / chunk.file, framework="pt") as file:
            box = tuple(slice(lo, lo + n) for lo, n in zip(chunk.offset, chunk.size, strict=True))
            whole[box] = file.get_tensor(name)
    return whole


def _make_index(metadata: Metadata, written: list[WriteResult]) -> TensorIndex:
    files = {result.index: result.storage_data[0] for result in written}
    index = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), f"{name} is not a tensor"
        chunks = [
            Chunk(file=files[MetadataIndex(name, chunk.offsets)], offset=tuple(chunk.offsets), size=tuple(chunk.sizes))
            for chunk in entry.chunks
            if chunk.sizes.numel()  # a rank may have nothing of a small tensor
        ]
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        index[name] = TensorEntry(dtype=dtype, shape=tuple(entry.size), chunks=chunks)
    return index


def _synced_entry(path: Path) -> FileEntry:
    """Wait until a file is on the disk, and describe it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
