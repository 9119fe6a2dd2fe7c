"""Recomputation, compilation and offload on a GPU, where copies really run beside the compute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lhcp.config import RunConfig
from lhcp.data import prepare
from lhcp.distributed.env import ProcessEnv, process_group
from lhcp.loss import linear_cross_entropy
from lhcp.parallelize import Mesh, full
from lhcp.trainer import Trainer
from runs import largest_error, make_config, write_data

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
MODEL = {"vocab_size": 257, "dim": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64,
         "ffn_dim": 192}  # fmt: skip
SETTINGS = [
    {"recompute": "none"},
    {"recompute": "selective", "recompute_layers": 3, "offload_layers": 2},
    {"recompute": "full", "offload_layers": 4},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group(ProcessEnv(0, 0, 1), torch.device("cuda", 0)):
        yield
    torch._dynamo.reset()


def cuda_config(data: Path, **changes: Any) -> RunConfig:
    values = {"model": MODEL, "device": "cuda", "dtype": "float32", "seq_len": 1440, "eval": {}}
    return make_config(data, 1, 1, **values | changes)


def make_trainer(config: RunConfig) -> Trainer:
    device = torch.device("cuda", 0)
    return Trainer(config, Mesh.build(config.parallel, device), device)


def gradients(config: RunConfig) -> list[dict[str, Tensor]]:
    """Of a Lighthouse step, and of a dense one."""
    trainer, found = make_trainer(config), []
    for step, mode in enumerate(("lighthouse", "dense")):
        trainer.gradients(step, trainer.attention(mode))
        found.append({name: full(p.grad).clone() for name, p in trainer.model.named_parameters()})
    return found


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_every_setting_gives_the_gradients_of_plain_layers(data: Path, compiled: bool) -> None:
    """In float32, where the difference is rounding: no near-tie of selection flips at these seeds."""
    expected = gradients(cuda_config(data, compile=False))
    for memory in SETTINGS:
        found = gradients(cuda_config(data, compile=compiled, memory=memory))
        for one, other in zip(found, expected, strict=True):
            assert largest_error(one, other) <= 1e-4, memory


def losses(config: RunConfig, steps: int) -> tuple[list[tuple[float, float]], int]:
    """Loss and gradient norm of each step, and in bytes what memory the steps after the first took at their peak.

    The first compiles. What was held before the run, and what it holds between its steps, does not count.
    """
    trainer = make_trainer(config)
    first = trainer.train_step()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    return [first, *(trainer.train_step() for _ in range(steps - 1))], torch.cuda.max_memory_allocated() - held


def test_offload_changes_no_bit_and_frees_its_inputs(data: Path) -> None:
    """bfloat16, deterministic kernels, compiled, twelve layers of 46,080 tokens: 11.8 MB an input.

    No dense layer: a deterministic dense backward takes more memory than all inputs, when none of them is left.
    """
    model, long = MODEL | {"num_layers": 12}, 46_080
    text = (Path(__file__).parents[2] / "LICENSE").read_bytes() * 40
    source = data.parent / "long"
    source.mkdir(exist_ok=True)
    (source / "long.txt").write_bytes(text)
    tokens = data.parent / "long-tokens"
    prepare([source], tokens, held_out=0.0)
    results = {}
    torch.use_deterministic_algorithms(True)
    try:
        for offloaded in (0, 11):
            memory = {"recompute": "selective", "offload_layers": offloaded}
            config = cuda_config(
                tokens,
                model=model,
                seq_len=long,
                global_batch_size=1,
                compute_dtype="bfloat16",
                memory=memory,
                dense_layers=[],
            )
            results[offloaded] = losses(config, 4)
    finally:
        torch.use_deterministic_algorithms(False)
    assert results[0][0] == results[11][0]
    row = long * model["dim"] * 2
    saved = results[0][1] - results[11][1]
    assert saved == pytest.approx(10 * row, rel=0.02)  # on the GPU stay the last layer's, and one that comes back


def test_the_loss_sums_its_gradient_in_float32() -> None:
    """bfloat16 operands, chunk after chunk into one float32 sum: the error does not grow with the chunks."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator, device="cuda") for n in (4096, 300))
    labels = torch.randint(0, 300, (1, 4096), generator=generator, device="cuda")
    errors = []
    for chunk in (4096, 16):
        leaves = [x.bfloat16().requires_grad_() for x in (hidden.unsqueeze(0), weight)]
        exact = [x.detach().double().requires_grad_() for x in leaves]
        found = torch.autograd.grad(linear_cross_entropy(*leaves, labels, chunk=chunk), leaves)
        expected = torch.autograd.grad(linear_cross_entropy(*exact, labels), exact)
        errors.append([float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)])
    assert max(errors[0]) < 1e-2
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
