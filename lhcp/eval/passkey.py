"""Passkey retrieval: whether a model repeats a digit that noise surrounds, by where it stands and how far back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lhcp.attention.layers import AttentionFunction
from lhcp.config import RunConfig
from lhcp.eval.prompts import DIGIT_TOKENS, passkey_prompts
from lhcp.model.llama import Llama
from lhcp.parallelize import Mesh, sum_over_ranks


@torch.no_grad()
def passkeys_found(
    model: Llama,
    config: RunConfig,
    attention: Sequence[AttentionFunction],
    mesh: Mesh,
    *,
    depth: float,
    samples: int,
    seed: int,
    at_once: int,
) -> int:
    """How many prompts of `config.seq_len` tokens get the right digit as the likeliest of ten (collective).

    Args:
        model: for byte-level tokens, sharded over the ranks.
        config: resolved.
        attention: what each layer runs.
        mesh: the ranks.
        depth: see `passkey_prompts`.
        samples: prompts, which dp divides.
        seed: of the prompts.
        at_once: tokens of a rank's forward pass, as far as prompts are shorter.

    Raises:
        ConfigError: a prompt of so few tokens has no room for statement and question.
    """
    device = model.output.weight.device
    cp, context = mesh.context_parallel, config.seq_len
    prompts, digits = passkey_prompts(context, depth, samples, seed)
    prompts, digits = prompts[mesh.dp_rank :: mesh.dp_size], digits[mesh.dp_rank :: mesh.dp_size]
    positions = cp.positions(config.padded_len, device)
    last = (positions == context - 1).nonzero().flatten().tolist()  # on one of the ranks that share a sequence
    rows = max(1, at_once // context)
    right = torch.zeros((), dtype=torch.int64, device=device)
    for first in range(0, len(prompts), rows):
        tokens = _shard(prompts[first : first + rows], cp.layout.runs(cp.rank, config.padded_len)).to(device)
        logits = model.logits(tokens, positions, attention, last[0] if last else 0)
        if last:
            answers = logits[:, list(DIGIT_TOKENS)].argmax(dim=1)
            right += (answers == torch.from_numpy(digits[first : first + rows]).to(device)).sum()
    return int(sum_over_ranks(right))


def _shard(prompts: NDArray[np.int64], runs: Sequence[tuple[int, int]]) -> Tensor:
    """The tokens in `runs`, joined; those beyond the prompts' end are padding: int64 [rows, n_local]."""
    padded = np.pad(prompts, ((0, 0), (0, max(0, runs[-1][1] - prompts.shape[1]))))
    return torch.from_numpy(np.concatenate([padded[:, lo:hi] for lo, hi in runs], axis=1))
