"""Which attention each layer of a model runs, by the mode of a stage or of an evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from lhcp.attention.layers import AttentionFunction, layer_attentions
from lhcp.config import EvalMode, RunConfig
from lhcp.distributed import ContextParallel


def attention_of(config: RunConfig, mode: EvalMode, cp: ContextParallel) -> list[AttentionFunction]:
    """What each of the model's layers runs in a stage, or an evaluation, of this mode.

    Args:
        config: resolved.
        mode: of the stage or evaluation.
        cp: the ranks that share the sequences.
    """
    layers = config.model.num_layers
    if mode == "no_attention":
        return [no_attention] * layers
    lighthouse = config.attention if mode == "lighthouse" else None
    valid_len = config.seq_len if config.padded_len > config.seq_len else None
    return layer_attentions(layers, cp, lighthouse, config.dense_layers, valid_len)


def no_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ARG001
    """Every attention output zero: what a model does without its context, for comparison."""
    return torch.zeros_like(q)
