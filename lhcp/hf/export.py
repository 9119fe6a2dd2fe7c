"""A checkpoint as a Hugging Face Llama folder: one CPU process, one output file in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lhcp.checkpoint.folder import unpublished
from lhcp.checkpoint.index import TensorIndex, read_index
from lhcp.checkpoint.manifest import Checkpoint, Manifest
from lhcp.checkpoint.storage import read_tensor
from lhcp.config import ConfigError
from lhcp.data.tokenizer import ByteTokenizer
from lhcp.files import sync_folder
from lhcp.hf.config import CONFIG_FILE, to_hf
from lhcp.hf.names import WEIGHTS_FILE, WEIGHTS_INDEX_FILE, Rows, hf_tensors
from lhcp.hf.tokenizer import tokenizer_files

ExportDtype = Literal["float32", "bfloat16", "float64"]


@dataclass(frozen=True)
class Exported:
    """What was written."""

    parameters: int
    dtype: str
    files: int
    """That hold the weights."""
    weight_bytes: int
    has_tokenizer: bool
    """Otherwise the checkpoint does not say which it is."""


def export_model(
    checkpoint: Checkpoint, out: Path, dtype: ExportDtype | None = None, max_shard_bytes: int = 5_000_000_000
) -> Exported:
    """Write the model of a checkpoint, of any layout, as the folder `out` for `transformers`.

    `out` appears when all of it is on the disk. Memory holds the tensors of one output file, and one tensor of the
    checkpoint more.

    Args:
        checkpoint: it is verified first.
        out: must not exist or be empty; folders above it are made.
        dtype: of the weights; None: as saved.
        max_shard_bytes: of the weights in one file; a larger tensor has a file of its own.

    Raises:
        ConfigError: `out` is in use, or its weights cannot be written.
        DamagedError: a file of the checkpoint is not what was written.
        OSError: the folder or a small file cannot be written.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder; name another")
    checkpoint.verify()
    manifest = checkpoint.manifest
    index = read_index(checkpoint)
    tensors = hf_tensors(manifest.model)
    saved = reduce(torch.promote_types, {getattr(torch, index[rows.tensor].dtype) for rows in tensors.values()})
    to = getattr(torch, dtype) if dtype else saved
    sizes = {name: prod(rows.shape) * to.itemsize for name, rows in tensors.items()}
    files = _divide(sizes, max_shard_bytes)
    with _published(out) as folder:
        for file, names in files.items():
            wanted = {name: tensors[name] for name in names}
            _save(_load(checkpoint, index, wanted, to), folder / file)
        for file, content in _descriptions(manifest, files, sizes, to).items():
            (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    parameters = sum(prod(rows.shape) for rows in tensors.values())
    return Exported(parameters, _name(to), len(files), sum(sizes.values()), _tokenizer(manifest) is not None)


def _divide(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """The tensors of each file, in order, by the file's name: as many as fit."""
    groups: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {WEIGHTS_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def _load(checkpoint: Checkpoint, index: TensorIndex, wanted: dict[str, Rows], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of the Hugging Face model; those that are rows of one of ours share its memory."""
    loaded = {}
    for source, parts in groupby(wanted.items(), key=lambda part: part[1].tensor):
        whole = read_tensor(checkpoint, index, source).to(dtype)
        for name, rows in parts:
            loaded[name] = whole[rows.start : rows.start + rows.shape[0]]
            assert loaded[name].shape == rows.shape, f"{source} is not of the manifest's model"
    return loaded


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk
        raise ConfigError(f"{path} cannot be written ({error})") from None
    path.chmod(path.parent.stat().st_mode & 0o666)  # else readable by the owner alone, whatever the umask


def _descriptions(
    manifest: Manifest, files: dict[str, list[str]], sizes: dict[str, int], dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """The JSON files beside the weights: content by name."""
    tokenizer = _tokenizer(manifest)
    eos_id = tokenizer.eos_id if tokenizer else None
    found = {CONFIG_FILE: to_hf(manifest.model, manifest.seq_len, _name(dtype), eos_id)}
    if tokenizer:
        found |= {"generation_config.json": {"eos_token_id": eos_id}, **tokenizer_files(manifest.seq_len)}
    if len(files) > 1:
        by_tensor = {name: file for file, names in files.items() for name in names}
        found[WEIGHTS_INDEX_FILE] = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": by_tensor}
    return found


def _tokenizer(manifest: Manifest) -> type[ByteTokenizer] | None:
    """The tokenizer of the run's data, if it is one that can be written."""
    return ByteTokenizer if manifest.data and manifest.data.tokenizer == ByteTokenizer.name else None


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, which becomes `out` when it is filled and on the disk; else nothing is left."""
    folder = unpublished(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():  # of a process that was killed
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        yield folder
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(folder)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sync_folder(out.parent)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
