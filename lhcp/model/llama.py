"""A Llama-style decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU (Touvron et al., arXiv:2302.13971).

Which attention each layer runs is the caller's: `forward` takes a function for each. Shape suffixes: B batch, N tokens
held here, E model width, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from lhcp.attention.layers import AttentionFunction
from lhcp.config import ModelConfig
from lhcp.loss import linear_cross_entropy, loss_and_gradient
from lhcp.model.rope import apply_rope, rope_tables


class Attention(nn.Module):
    """Projections and RoPE around an attention function."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.dim, sum(self.heads) * config.head_dim, bias=False)
        self.out = nn.Linear(config.num_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x_BNE: Tensor, cos: Tensor, sin: Tensor, attention: AttentionFunction) -> Tensor:
        """[B, N, E] -> [B, N, E]."""
        q, k, v = self.qkv(x_BNE).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)
        out_BNHD = attention(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)
        out: Tensor = self.out(out_BNHD.flatten(2))
        return out


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x_BNE: Tensor) -> Tensor:
        """[B, N, E] -> [B, N, E]."""
        gate, up = self.gate_up(x_BNE).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BNE: Tensor, cos: Tensor, sin: Tensor, attention: AttentionFunction) -> Tensor:
        """[B, N, E] -> [B, N, E]."""
        x_BNE = x_BNE + self.attention(self.attention_norm(x_BNE), cos, sin, attention)
        out: Tensor = x_BNE + self.feed_forward(self.feed_forward_norm(x_BNE))
        return out


class Llama(nn.Module):
    """Tokens and labels to the summed loss: inside `forward`, so that sharded parameters are gathered for all of it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.embedding.weight
        self.loss_and_gradient = loss_and_gradient

    def forward(
        self, tokens_BN: Tensor, labels_BN: Tensor, positions_N: Tensor, attention: Sequence[AttentionFunction]
    ) -> Tensor:
        """Sum of the cross-entropies in nats, a scalar; labels are int64, `loss.IGNORE` where none counts."""
        hidden_BNE = self.hidden(tokens_BN, positions_N, attention)
        with record_function("loss"):  # its name in a profile
            return linear_cross_entropy(hidden_BNE, self.output.weight, labels_BN, softmax=self.loss_and_gradient)

    def logits(
        self, tokens_BN: Tensor, positions_N: Tensor, attention: Sequence[AttentionFunction], index: int
    ) -> Tensor:
        """Of the token after the one at `index` of those held here: [B, vocabulary]. Arguments as for `hidden`."""
        out: Tensor = self.output(self.hidden(tokens_BN, positions_N, attention)[:, index])
        return out

    def hidden(self, tokens_BN: Tensor, positions_N: Tensor, attention: Sequence[AttentionFunction]) -> Tensor:
        """Normalised final hidden states, [B, N, E].

        Args:
            tokens_BN: int64.
            positions_N: int64, the tokens' positions in the whole sequence.
            attention: what each layer runs, in order.
        """
        config = self.config
        x_BNE = self.embedding(tokens_BN)
        cos, sin = rope_tables(positions_N, config.head_dim, config.rope_theta, x_BNE.dtype, config.rope_scaling)
        for block, function in zip(self.blocks, attention, strict=True):
            x_BNE = block(x_BNE, cos, sin, function)
        out: Tensor = self.norm(x_BNE)
        return out

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal weights of standard deviation 0.02, residual outputs divided by sqrt(2 x layers) (GPT-2).

        A tied output weight is the embedding, and is drawn once: `named_parameters` names a parameter once.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0)
                continue
            residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
            std = 0.02 / math.sqrt(2 * self.config.num_layers) if residual else 0.02
            # Drawn in float32 on the CPU, so that every device and dtype starts from the same weights.
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
