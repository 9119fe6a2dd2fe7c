"""A Hugging Face Llama folder as a checkpoint that runs start from. Reads safetensors files, never a pickle."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from lhcp.checkpoint.folder import unpublished
from lhcp.checkpoint.manifest import Checkpoint, Manifest
from lhcp.checkpoint.storage import CheckpointWriter
from lhcp.config import ConfigError, ModelConfig
from lhcp.environment import now, versions
from lhcp.hf.config import read_config, read_json
from lhcp.hf.names import EMBEDDING, OUTPUT, WEIGHTS_FILE, WEIGHTS_INDEX_FILE, hf_tensors, our_tensors

_DTYPES = ("F16", "BF16", "F32", "F64")
"""That weights can have, in safetensors' words."""
_PICKLES = ("*.bin", "*.pt", "*.pth")
_LISTED = 4
"""Tensors that a message names; of more it gives the number."""


@dataclass(frozen=True)
class _Source:
    """Where a tensor of the folder is, and what its file says of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def import_model(hf_dir: Path, out: Path) -> Checkpoint:
    """Write the checkpoint `out` with the weights of the Hugging Face Llama in `hf_dir`, and open it.

    Weights in float16 and bfloat16 become float32, which is exact; others stay as they are. Memory holds all once.

    Args:
        hf_dir: `config.json`, and `model.safetensors` or the index of several such files.
        out: must not exist; folders above it are made.

    Raises:
        ConfigError: naming what is missing in `hf_dir` or what lhcp cannot compute; or `out` exists or cannot be
            written.
    """
    out = out.absolute()
    if os.path.lexists(out):
        raise ConfigError(f"{out} exists; name another folder")
    model, seq_len = read_config(hf_dir)
    sources = _find_tensors(hf_dir)
    _check(sources, model, hf_dir)
    manifest = Manifest(
        created=now(),
        model=model,
        seq_len=seq_len,
        versions=versions(),
    )
    tensors = {ours: _join(sources, names) for ours, names in our_tensors(model).items()}
    _write(tensors, out, manifest)
    return Checkpoint.open(out)


def _find_tensors(hf_dir: Path) -> dict[str, _Source]:
    """Every tensor in the weights of `hf_dir`, without reading any."""
    sources = {}
    for name in _weight_files(hf_dir):
        path = hf_dir / name
        try:
            with safe_open(path, framework="pt") as file:
                for tensor in file.keys():  # noqa: SIM118  (no mapping)
                    header = file.get_slice(tensor)
                    sources[tensor] = _Source(path, tuple(header.get_shape()), header.get_dtype())
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing, but {WEIGHTS_INDEX_FILE} lists it") from None
        except SafetensorError as error:
            raise ConfigError(f"{path} is damaged or not a safetensors file ({error})") from None
    return sources


def _weight_files(hf_dir: Path) -> list[str]:
    if (hf_dir / WEIGHTS_FILE).exists():
        return [WEIGHTS_FILE]
    index = hf_dir / WEIGHTS_INDEX_FILE
    if index.exists():
        files = set(_weight_map(index).values())
        if any(not isinstance(file, str) or Path(file).name != file for file in files):
            raise ConfigError(f"{index}: weight_map must give the names of files beside it")
        return sorted(files)
    pickles = sorted(path.name for pattern in _PICKLES for path in hf_dir.glob(pattern))
    if pickles:
        raise ConfigError(
            f"{hf_dir} has its weights only as {_listed(pickles)}: pickles, which can run any code when they are read. "
            f"Convert them to safetensors first, with LlamaForCausalLM.from_pretrained(...).save_pretrained(...) of "
            f"transformers"
        )
    raise ConfigError(f"no {WEIGHTS_FILE} and no {WEIGHTS_INDEX_FILE} in {hf_dir}")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        files = read_json(index).get("weight_map")
    except ConfigError as error:
        raise ConfigError(f"{index}: {error}") from None
    if not isinstance(files, dict):
        raise ConfigError(f"{index}: weight_map must be an object")
    return files


def _check(sources: dict[str, _Source], model: ModelConfig, hf_dir: Path) -> None:
    """Refuse weights that are not those of `model`."""
    expected = hf_tensors(model)
    # Old files hold the frequencies of RoPE, which follow from the configuration.
    given = {name for name in sources if not name.endswith("rotary_emb.inv_freq")}
    if model.tie_embeddings and OUTPUT in given:
        _check_tied(sources, hf_dir)
        given.remove(OUTPUT)
    problems = []
    if missing := [name for name in expected if name not in given]:
        hint = "; or config.json must say tie_word_embeddings: true" if missing == [OUTPUT] else ""
        problems.append(f"missing: {_listed(missing)}{hint}")
    if unexpected := sorted(given - expected.keys()):
        problems.append(f"no part of the model in config.json: {_listed(unexpected)}")
    common = [(name, sources[name], rows.shape) for name, rows in expected.items() if name in given]
    if wrong := [f"{name} {source.shape}, not {shape}" for name, source, shape in common if source.shape != shape]:
        problems.append(f"of another shape: {_listed(wrong)}")
    if wrong := [f"{name} {source.dtype}" for name, source, _ in common if source.dtype not in _DTYPES]:
        problems.append(f"of a dtype that is none of {', '.join(_DTYPES)}: {_listed(wrong)}")
    if problems:
        raise ConfigError("\n".join(f"{hf_dir}: tensors {problem}" for problem in problems))


def _check_tied(sources: dict[str, _Source], hf_dir: Path) -> None:
    if EMBEDDING in sources and not torch.equal(_read(sources, EMBEDDING), _read(sources, OUTPUT)):
        raise ConfigError(
            f"{hf_dir}: config.json says tie_word_embeddings: true, but {OUTPUT} is not {EMBEDDING}; set it to false"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _join(sources: dict[str, _Source], names: Iterable[str]) -> Tensor:
    """One of our tensors, in float32 or float64."""
    whole = torch.cat([_read(sources, name) for name in names])
    return whole.to(torch.promote_types(whole.dtype, torch.float32))


def _read(sources: dict[str, _Source], name: str) -> Tensor:
    with safe_open(sources[name].file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _write(tensors: dict[str, Tensor], out: Path, manifest: Manifest) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # That there are no other processes is what no_dist asks for.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            save(tensors, storage_writer=CheckpointWriter(out, 0, manifest), no_dist=True)
    except CheckpointException as failure:
        shutil.rmtree(unpublished(out), ignore_errors=True)
        error, _ = failure.failures[0]
        if isinstance(error, OSError | SafetensorError):  # no permission, a full disk
            raise ConfigError(f"{out} cannot be written ({error})") from None
        raise
