"""One process against an independent, plain model: a bug common to all layouts would pass their comparison."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import oracle
from lhcp.attention import select
from lhcp.attention.layers import AttentionFunction
from lhcp.config import RunConfig
from lhcp.data import TokenDataset, sequence_ids
from lhcp.model.llama import Llama
from lhcp.modes import no_attention
from lhcp.parallelize import full
from lhcp.presets import MODEL_PRESETS
from ranks import run_ranks
from runs import make_config, make_trainer, write_data

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """Pairs (i, i + D/2) of token t turned by t theta^(-2i/D), as complex numbers."""
    n, half = x.shape[0], x.shape[-1] // 2
    frequency = torch.tensor([theta ** (-2 * i / (2 * half)) for i in range(half)], dtype=torch.float64)
    turn = torch.polar(torch.ones(n, half, dtype=torch.float64), torch.outer(torch.arange(n).double(), frequency))
    turned = torch.complex(x[..., :half], x[..., half:]) * turn.unsqueeze(1)
    return torch.cat((turned.real, turned.imag), -1)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[n, H, D] queries, [n, G, D] keys and values."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    future = torch.full((len(q), len(q)), -math.inf, dtype=q.dtype).triu(1)
    weights = (torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1]) + future).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, v)


def lighthouse(config: RunConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The oracle, at the selection under test (which has its own tests)."""
    a = config.attention
    entries = select(q[None].detach(), k[None].detach(), a).entries.tolist()
    return oracle.attention(q[None], k[None], v[None], entries, a.num_levels, a.pooling_factor)[0]


def plain_loss(config: RunConfig, w: Weights, tokens: Tensor, labels: Tensor, mode: str) -> Tensor:
    """Mean loss of sequences [b, N], written out."""
    m = config.model
    losses = []
    for row, target in zip(tokens, labels, strict=True):
        x = w["embedding.weight"][row]
        for layer in range(m.num_layers):
            name = f"blocks.{layer}."
            y = rms(x, w[name + "attention_norm.weight"], m.norm_eps) @ w[name + "attention.qkv.weight"].T
            q, k, v = y.unflatten(-1, (-1, m.head_dim)).split((m.num_heads, m.num_kv_heads, m.num_kv_heads), 1)
            q, k = rotate(q, m.rope_theta), rotate(k, m.rope_theta)
            sparse = mode == "lighthouse" and layer not in config.dense_layers
            out = lighthouse(config, q, k, v) if sparse else causal(q, k, v)
            x = x + out.flatten(1) @ w[name + "attention.out.weight"].T
            y = rms(x, w[name + "feed_forward_norm.weight"], m.norm_eps) @ w[name + "feed_forward.gate_up.weight"].T
            gate, up = y.chunk(2, -1)
            x = x + (gate * gate.sigmoid() * up) @ w[name + "feed_forward.down.weight"].T
        logits = rms(x, w["norm.weight"], m.norm_eps) @ w["output.weight"].T
        losses.append(F.cross_entropy(logits, target))
    return torch.stack(losses).mean()


def batch(config: RunConfig, split: str, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    dataset = TokenDataset(config.data.path, split)
    stream = torch.from_numpy(dataset.read(0, dataset.num_tokens))
    n = config.seq_len
    tokens = torch.stack([stream[i * n : (i + 1) * n] for i in ids.tolist()])
    return tokens, torch.stack([stream[i * n + 1 : (i + 1) * n + 1] for i in ids.tolist()])


STEPS = 4


def run(config: RunConfig, rank: int) -> tuple[Weights, list[tuple[float, float]], Weights, float]:
    trainer = make_trainer(config)
    before = {name: full(p.detach()).clone() for name, p in trainer.model.named_parameters()}
    steps = [trainer.train_step() for step in range(STEPS)]
    after = {name: full(p.detach()).clone() for name, p in trainer.model.named_parameters()}
    return before, steps, after, trainer.held_out("dense")


def test_steps_and_evaluation_are_those_of_a_plain_model(data: Path) -> None:
    """Two Lighthouse steps and two dense ones: warm-up, clipping that binds, AdamW, all by hand; held-out loss."""
    stages = [{"mode": "lighthouse", "steps": 2}, {"mode": "dense", "steps": 2}]
    model = make_config(data, 1, 1).model.model_dump() | {"rope_theta": 50.0, "norm_eps": 1e-2}
    config = make_config(
        data, 1, 1, stages=stages, model=model, optim={"lr": 3e-3, "warmup_steps": 3, "grad_clip": 0.1}
    )
    ((weights, steps, after, held_out),) = run_ranks(1, partial(run, config))

    weights = {name: w.requires_grad_() for name, w in weights.items()}
    mean, square = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for step in range(STEPS):
        ids = sequence_ids(config.seed, step, 4, TokenDataset(data, "train").num_sequences(config.seq_len))
        mode = "lighthouse" if step < 2 else "dense"
        loss = plain_loss(config, weights, *batch(config, "train", ids), mode)
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        assert steps[step] == pytest.approx((loss.item(), norm), rel=1e-9)
        assert norm > 0.1, "the clip should bind"
        lr = 3e-3 * min(1, (step + 1) / 3)
        with torch.no_grad():
            for name, w in weights.items():
                g = gradients[name] * 0.1 / (norm + 1e-6)
                mean[name].mul_(0.9).add_(g, alpha=0.1)
                square[name].mul_(0.95).add_(g * g, alpha=0.05)
                if w.dim() == 2:
                    w.mul_(1 - lr * 0.1)
                root = (square[name] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
                w.sub_(lr * mean[name] / (1 - 0.9 ** (step + 1)) / root)
    for name, w in weights.items():
        torch.testing.assert_close(after[name], w.detach(), rtol=1e-8, atol=1e-12)
    expected = plain_loss(config, weights, *batch(config, "held_out", np.arange(2)), "dense")
    assert held_out == pytest.approx(expected.item(), rel=1e-9)


def test_initial_weights() -> None:
    """Standard deviation 0.02; what writes to the residual stream, divided by sqrt(2 layers)."""
    model = Llama(MODEL_PRESETS["tiny"])
    model.init_weights(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert bool((parameter == 1).all())
            continue
        residual = name.endswith(("attention.out.weight", "down.weight"))
        assert parameter.std().item() == pytest.approx(0.02 / (math.sqrt(8) if residual else 1), rel=0.03)


def test_no_attention_is_zero() -> None:
    q = torch.randn(1, 3, 2, 4)
    assert not no_attention(q, q, q).any()


def poisoned(config: RunConfig, steps: set[int], rank: int) -> list[tuple[float, float, int, bool]]:
    """Of each step: loss, gradient norm, updates so far, and whether weights changed; rank 1's gradient is NaN."""
    trainer = make_trainer(config)
    honest = trainer.gradients

    def gradients(step: int, attention: list[AttentionFunction]) -> Tensor:
        loss = honest(step, attention)
        if step in steps and rank == 1:
            trainer.model.norm.weight.grad.to_local()[0] = torch.nan
        return loss

    trainer.gradients = gradients
    seen = []
    for _ in range(6):
        kept = [full(p.detach()).clone() for p in trainer.model.parameters()]
        loss, norm = trainer.train_step()
        changed = any(not torch.equal(a, full(b)) for a, b in zip(kept, trainer.model.parameters(), strict=True))
        seen.append((loss, norm, trainer.optimizer_steps, changed))
    return seen


def test_steps_that_are_not_finite_are_skipped_and_counted(data: Path) -> None:
    """A NaN in one rank's shard of the gradient: every rank leaves the weights alone, and goes on with the next."""
    config = make_config(data, 1, 2, optim={"max_skipped_steps": 2})
    for seen in run_ranks(2, partial(poisoned, config, {1, 2, 4})):
        assert [math.isfinite(norm) for _, norm, _, _ in seen] == [True, False, False, True, False, True]
        assert [updates for _, _, updates, _ in seen] == [1, 1, 1, 2, 2, 3]
        assert [changed for _, _, _, changed in seen] == [True, False, False, True, False, True]


def test_too_many_in_a_row_end_the_run_before_the_weights_are_lost(data: Path) -> None:
    def diverge(rank: int) -> tuple[str, bool]:
        trainer = make_trainer(make_config(data, 1, 2, optim={"lr": 1e200, "warmup_steps": 0, "max_skipped_steps": 1}))
        trainer.train_step()
        kept = [full(p.detach()).clone() for p in trainer.model.parameters()]
        trainer.train_step()
        try:
            trainer.train_step()
        except FloatingPointError as error:
            same = all(torch.equal(a, full(b)) for a, b in zip(kept, trainer.model.parameters(), strict=True))
            return str(error), same
        return "", False

    for message, same in run_ranks(2, diverge):
        assert message.startswith("step 3: the loss is ")
        assert "after 1 such step(s) in a row" in message
        assert "Lower optim.lr" in message
        assert same
