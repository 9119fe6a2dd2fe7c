"""Checkpoints of random models, as a run would leave them."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save

from lhcp.checkpoint.manifest import Checkpoint, DataEntry, Manifest
from lhcp.checkpoint.storage import CheckpointWriter
from lhcp.config import LinearRopeScaling, Llama3RopeScaling, ModelConfig
from lhcp.distributed import ContextParallel
from lhcp.model.llama import Llama

BYTES = DataEntry(fingerprint="0", tokenizer="byte", vocab_size=257)
PLAIN = ModelConfig(vocab_size=257, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=10, ffn_dim=44)
LLAMA3 = Llama3RopeScaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=64)
MODELS = {
    "GQA": PLAIN,
    "MHA": PLAIN.model_copy(update={"num_kv_heads": 4, "head_dim": 8, "norm_eps": 1e-3, "rope_theta": 700.0}),
    "tied": PLAIN.model_copy(update={"tie_embeddings": True}),
    "linear": PLAIN.model_copy(update={"rope_scaling": LinearRopeScaling(factor=3.0), "rope_theta": 500.0}),
    "llama3": PLAIN.model_copy(update={"rope_scaling": LLAMA3, "num_kv_heads": 1}),
}


def random_model(config: ModelConfig, seed: int = 0) -> Llama:
    """In float32, norms too: weights large enough that every part of the model shows in its outputs."""
    generator = torch.Generator().manual_seed(seed)
    model = Llama(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty(parameter.shape).normal_(0.0, 0.25, generator=generator)
            parameter.copy_(noise if parameter.dim() > 1 else 1 + noise)
    return model


def tensors_of(model: Llama) -> dict[str, Tensor]:
    """By their names in a checkpoint."""
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}


def make_manifest(config: ModelConfig, data: DataEntry | None = BYTES, seq_len: int = 512) -> Manifest:
    return Manifest(created="2026-01-01", step=7, model=config, seq_len=seq_len, data=data, versions={})


def save_model(
    config: ModelConfig, folder: Path, tensors: dict[str, Tensor], data: DataEntry | None = BYTES
) -> Checkpoint:
    """The checkpoint `folder` with these tensors, by one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        save(tensors, storage_writer=CheckpointWriter(folder, 0, make_manifest(config, data)), no_dist=True)
    return Checkpoint.open(folder)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@torch.no_grad()
def dense_logits(model: Llama, tokens_BN: Tensor) -> Tensor:
    """[B, N, V], with ordinary full attention."""
    context_parallel = ContextParallel()
    hidden = model.hidden(tokens_BN, torch.arange(tokens_BN.shape[1]), [context_parallel.attend] * len(model.blocks))
    return hidden @ model.output.weight.T
