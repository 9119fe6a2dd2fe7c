"""Held-out loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lhcp.attention.layers import AttentionFunction
from lhcp.config import RunConfig
from lhcp.data import TokenDataset, held_out_batches
from lhcp.model.llama import Llama
from lhcp.parallelize import Mesh, sum_over_ranks


@torch.no_grad()
def held_out_loss(
    model: Llama, dataset: TokenDataset, config: RunConfig, attention: Sequence[AttentionFunction], mesh: Mesh
) -> float:
    """Mean loss in nats per token over the first `eval.sequences` held-out sequences of a run (collective).

    Raises:
        ConfigError: too few held-out sequences, or a number that dp does not divide.
    """
    device = model.output.weight.device
    cp = mesh.context_parallel
    positions = cp.positions(config.padded_len, device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tokens, labels in held_out_batches(
        dataset,
        seq_len=config.seq_len,
        num_sequences=config.eval.sequences,
        runs=cp.layout.runs(cp.rank, config.padded_len),
        dp_rank=mesh.dp_rank,
        dp_size=mesh.dp_size,
    ):
        total += model(torch.from_numpy(tokens).to(device), torch.from_numpy(labels).to(device), positions, attention)
    return float(sum_over_ranks(total)) / (config.eval.sequences * config.seq_len)
