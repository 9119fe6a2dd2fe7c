"""The model, its rotary tables, its loss, its optimizer and its FLOP count."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lhcp.config import LinearRopeScaling, Llama3RopeScaling, ModelConfig, OptimConfig, RunConfig
from lhcp.distributed import ContextParallel
from lhcp.flops import peak_flops, step_flops
from lhcp.loss import IGNORE, linear_cross_entropy
from lhcp.model.llama import Llama
from lhcp.model.rope import apply_rope, rope_tables
from lhcp.optim import learning_rate, make_optimizer
from lhcp.presets import MODEL_PRESETS

SMALL = ModelConfig(vocab_size=61, dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=40)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ContextParallel().attend(q, k, v)


def test_the_530m_preset_has_530m_parameters() -> None:
    with torch.device("meta"):
        model = Llama(MODEL_PRESETS["llama-530m"])
    assert sum(p.numel() for p in model.parameters()) == 530_055_168 + 61 * 1024  # matrices, and norms


def test_rope_is_exact_at_a_million_tokens() -> None:
    """Where float32 angles would be wrong by some hundredths in the cosine."""
    positions = torch.tensor([0, 1, 1_048_575])
    cos, sin = rope_tables(positions, 8, 10_000.0, torch.bfloat16)
    assert cos.dtype == torch.float32
    for row, position in enumerate(positions.tolist()):
        for i in range(4):
            angle = position * 10_000.0 ** (-2 * i / 8)
            assert cos[row, 0, i].item() == pytest.approx(math.cos(angle), abs=1e-6)
            assert sin[row, 0, i].item() == pytest.approx(math.sin(angle), abs=1e-6)


def test_linear_rope_scaling_divides_positions() -> None:
    positions = torch.arange(0, 4000, 7)
    scaled = rope_tables(positions * 4, 16, 500.0, torch.float64, LinearRopeScaling(factor=4.0))
    for table, expected in zip(scaled, rope_tables(positions, 16, 500.0, torch.float64), strict=True):
        torch.testing.assert_close(table, expected, rtol=0, atol=1e-10)


def test_llama3_rope_scaling_by_its_three_cases() -> None:
    """Those of Llama 3.1, written out: short waves stay, long ones are stretched, those in between go over."""
    scaling = Llama3RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    position, cases = 1_048_575, set()
    cos, sin = rope_tables(torch.tensor([position]), 128, 500_000.0, torch.float64, scaling)
    for i in range(64):
        frequency = 500_000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            case = "short"
        elif wavelength > 8192 / 1:
            case, frequency = "long", frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            case, frequency = "between", (1 - smooth) * frequency / 8 + smooth * frequency
        cases.add(case)
        assert cos[0, 0, i].item() == pytest.approx(math.cos(position * frequency), abs=1e-8)
        assert sin[0, 0, i].item() == pytest.approx(math.sin(position * frequency), abs=1e-8)
    assert cases == {"short", "between", "long"}


def test_rope_makes_products_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 8, dtype=torch.float64)
    cos, sin = rope_tables(torch.arange(200), 8, 100.0, torch.float64)

    def product(m: int, n: int) -> float:
        rotated = [apply_rope(x.view(1, 1, 1, 8), cos[i : i + 1], sin[i : i + 1]) for x, i in ((q, m), (k, n))]
        return float((rotated[0] * rotated[1]).sum())

    assert product(17, 5) == pytest.approx(product(180, 168), rel=1e-12)
    assert product(17, 5) != pytest.approx(product(17, 6), rel=1e-3)


def test_weights_depend_on_the_seed_alone() -> None:
    models = [Llama(SMALL).to(dtype) for dtype in (torch.float64, torch.float32)]
    for model in models:
        model.init_weights(3)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a.float(), b)
    models[1].init_weights(4)
    assert not torch.equal(models[0].output.weight.float(), models[1].output.weight)


def test_a_tied_output_is_the_embedding() -> None:
    tied, untied = Llama(SMALL.model_copy(update={"tie_embeddings": True})).double(), Llama(SMALL).double()
    tied.init_weights(3)
    untied.init_weights(3)
    assert tied.output.weight is tied.embedding.weight
    assert "output.weight" not in dict(tied.named_parameters())
    for name, parameter in tied.named_parameters():
        assert torch.equal(parameter, untied.get_parameter(name))
    with torch.no_grad():
        untied.output.weight.copy_(untied.embedding.weight)
    tokens, labels = torch.randint(0, 61, (2, 1, 20))
    for model in (tied, untied):
        model(tokens, labels, torch.arange(20), [dense] * SMALL.num_layers).backward()
    assert untied.embedding.weight.grad is not None
    assert untied.output.weight.grad is not None
    both = untied.embedding.weight.grad + untied.output.weight.grad
    torch.testing.assert_close(tied.embedding.weight.grad, both, rtol=1e-12, atol=1e-14)


def test_no_output_depends_on_a_later_token() -> None:
    model = Llama(SMALL).double()
    model.init_weights(0)
    tokens = torch.randint(0, 61, (1, 20))
    hidden = model.hidden(tokens, torch.arange(20), [dense] * SMALL.num_layers)
    for t in range(19):
        changed = tokens.clone()
        changed[:, t + 1 :] = (changed[:, t + 1 :] + 1) % 61
        again = model.hidden(changed, torch.arange(20), [dense] * SMALL.num_layers)
        torch.testing.assert_close(again[:, : t + 1], hidden[:, : t + 1], rtol=1e-12, atol=1e-14)
        assert not torch.allclose(again[:, t + 1 :], hidden[:, t + 1 :])


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunked_loss_is_the_plain_one(chunk: int) -> None:
    hidden = torch.randn(3, 11, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(61, 24, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 61, (3, 11))
    labels[0, 3:9] = IGNORE
    plain = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    expected = torch.autograd.grad(plain, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, labels, chunk)
    for value, reference in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-12, atol=1e-12)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)


def test_bfloat16_loss_is_summed_in_float32() -> None:
    hidden, weight = torch.randn(1, 4096, 24).bfloat16(), torch.randn(61, 24).bfloat16()
    labels = torch.randint(0, 61, (1, 4096))
    loss = linear_cross_entropy(hidden, weight, labels, 512)
    logits = F.linear(hidden, weight).double().flatten(0, 1)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits, labels.flatten(), reduction="sum")), rel=1e-5)


def test_loss_without_a_valid_label_is_zero() -> None:
    hidden = torch.randn(1, 5, 24, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(61, 24), torch.full((1, 5), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


def test_schedule() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=0), 0) == 1.0


def test_norms_do_not_decay() -> None:
    model = Llama(SMALL)
    matrices, vectors = make_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups
    assert {p.dim() for p in matrices["params"]} == {2}
    assert {p.dim() for p in vectors["params"]} == {1}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_flops_by_hand() -> None:
    """dim 8, 2 layers, 2 heads and 1 KV head of 4, FFN 10, vocabulary 16, N = 64; S = 64/4 + 2 x 8 = 32."""
    config = RunConfig.model_validate(
        {
            "output_dir": "x", "seq_len": 64, "global_batch_size": 3, "data": {"path": "x"},
            "model": {"vocab_size": 16, "dim": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4,
                      "ffn_dim": 10},
            "stages": [{"mode": "dense", "steps": 1}], "dense_layers": [1],
            "attention": {"num_levels": 2, "pooling_factor": 4, "topk": 4},
        }
    )  # fmt: skip
    # A layer: Q and output 8x8 each, K and V 8x4 each, three FFN matrices 8x10.
    matrices = 2 * (2 * 64 + 2 * 32 + 3 * 80) + 16 * 8
    dense_pairs, sparse_pairs = 64 * 64 // 2, 32 * 32 // 2
    products = 2 * matrices * 64
    assert step_flops(config, "dense") == 3 * 3 * (products + 4 * 8 * 2 * dense_pairs)
    assert step_flops(config, "lighthouse") == 3 * 3 * (products + 4 * 8 * (dense_pairs + sparse_pairs))


def test_peak_of_known_devices() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA GeForce GTX 970") is None


def test_the_head_s_gradient_is_summed_in_float32() -> None:
    """bfloat16, chunk after chunk into one sum: the error does not grow with the chunks, as one in bfloat16 would."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, 4096, 24, generator=generator), torch.randn(61, 24, generator=generator)
    labels = torch.randint(0, 61, (1, 4096), generator=generator)
    errors = []
    for chunk in (4096, 16):
        leaves = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
        exact = [x.detach().double().requires_grad_() for x in leaves]
        found = torch.autograd.grad(linear_cross_entropy(*leaves, labels, chunk=chunk), leaves)
        expected = torch.autograd.grad(linear_cross_entropy(*exact, labels), exact)
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)])
    assert max(errors[0]) < 1e-2
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


def test_loss_and_its_gradient_only_where_they_are_wanted() -> None:
    hidden, weight = torch.randn(1, 9, 8, dtype=torch.float64), torch.randn(13, 8, dtype=torch.float64)
    labels = torch.randint(0, 13, (1, 9))
    both = [x.clone().requires_grad_() for x in (hidden, weight)]
    linear_cross_entropy(*both, labels).backward()
    for i in (0, 1):
        leaves = [hidden.clone(), weight.clone()]
        leaves[i].requires_grad_()
        linear_cross_entropy(*leaves, labels, chunk=4).backward()
        assert both[i].grad is not None
        torch.testing.assert_close(leaves[i].grad, both[i].grad)
    assert not linear_cross_entropy(hidden, weight, labels).requires_grad
