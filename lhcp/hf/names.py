"""Whose tensor is whose: each tensor of a Hugging Face Llama is a run of rows of one of ours. Imports no torch.

Ours hold q, k and v in one matrix, and gate and up in another, one after the other. RoPE rotates the same pairs of a
head in both, so no row moves within a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lhcp.config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"
"""Instead of that file, where there are several."""


@dataclass(frozen=True)
class Rows:
    """Rows of one of our tensors: the whole of a Hugging Face tensor."""

    tensor: str
    """Name in a checkpoint."""
    start: int
    shape: tuple[int, ...]


def hf_tensors(config: ModelConfig) -> dict[str, Rows]:
    """Every tensor of the Hugging Face model in its order, by name; without the output of a model that ties it."""
    return {name: Rows(f"model.{ours}", start, shape) for name, ours, start, shape in _tensors(config)}


def our_tensors(config: ModelConfig) -> dict[str, list[str]]:
    """Every tensor of a checkpoint's model, as the names of the Hugging Face tensors whose rows it joins, in order."""
    joined: dict[str, list[str]] = {}
    for name, rows in hf_tensors(config).items():
        joined.setdefault(rows.tensor, []).append(name)
    return joined


_Row = tuple[str, str, int, tuple[int, ...]]
"""Name in Hugging Face's model, name in ours, first row, shape."""


def _tensors(config: ModelConfig) -> Iterator[_Row]:
    yield EMBEDDING, "embedding.weight", 0, (config.vocab_size, config.dim)
    for layer in range(config.num_layers):
        yield from _layer(config, f"model.layers.{layer}", f"blocks.{layer}")
    yield "model.norm.weight", "norm.weight", 0, (config.dim,)
    if not config.tie_embeddings:
        yield OUTPUT, "output.weight", 0, (config.vocab_size, config.dim)


def _layer(config: ModelConfig, theirs: str, ours: str) -> Iterator[_Row]:
    dim, ffn = config.dim, config.ffn_dim
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", 0, (dim,)
    yield f"{theirs}.self_attn.q_proj.weight", f"{ours}.attention.qkv.weight", 0, (q, dim)
    yield f"{theirs}.self_attn.k_proj.weight", f"{ours}.attention.qkv.weight", q, (kv, dim)
    yield f"{theirs}.self_attn.v_proj.weight", f"{ours}.attention.qkv.weight", q + kv, (kv, dim)
    yield f"{theirs}.self_attn.o_proj.weight", f"{ours}.attention.out.weight", 0, (dim, q)
    yield f"{theirs}.post_attention_layernorm.weight", f"{ours}.feed_forward_norm.weight", 0, (dim,)
    yield f"{theirs}.mlp.gate_proj.weight", f"{ours}.feed_forward.gate_up.weight", 0, (ffn, dim)
    yield f"{theirs}.mlp.up_proj.weight", f"{ours}.feed_forward.gate_up.weight", ffn, (ffn, dim)
    yield f"{theirs}.mlp.down_proj.weight", f"{ours}.feed_forward.down.weight", 0, (dim, ffn)
