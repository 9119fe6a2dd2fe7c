"""Arithmetic of a training step, for model FLOPs utilisation. Imports no torch."""

from __future__ import annotations

from lhcp.config import RunConfig, StageMode

PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bf16 FLOP/s by the vendor's data sheets (SXM parts), by a word of the device's name."""


def step_flops(config: RunConfig, mode: StageMode) -> float:
    """FLOPs of one optimizer step over all ranks: 3x the forward's matrix products, recomputation not counted.

    Causal attention over n rows counts n^2 / 2 pairs, with n = N in a dense layer and S in a Lighthouse layer.
    """
    model, seq_len = config.model, config.seq_len
    width = model.num_heads * model.head_dim
    per_layer = model.dim * (2 * width + 2 * model.num_kv_heads * model.head_dim) + 3 * model.dim * model.ffn_dim
    matrices = model.num_layers * per_layer + model.vocab_size * model.dim
    num_dense = model.num_layers if mode == "dense" else len(set(config.dense_layers))
    num_sparse = model.num_layers - num_dense
    pairs = num_dense * seq_len**2 / 2
    if num_sparse:
        pairs += num_sparse * config.attention.subsequence_length(config.padded_len) ** 2 / 2
    forward = 2 * matrices * seq_len + 4 * pairs * width
    return 3.0 * forward * config.global_batch_size


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device, or None when it is not known."""
    return next((peak for word, peak in PEAK_BF16.items() if word in device_name), None)
