"""Recomputation, compilation, offload, mixed layers and sharded parameters, each with each: what they compute."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from lhcp import offload, parallelize
from lhcp.config import ConfigError, RunConfig, StageMode
from lhcp.distributed.exchange.local import LocalExchange
from lhcp.distributed.exchange.ring import RingExchange
from lhcp.kernels.lighthouse import reference
from lhcp.parallelize import full
from ranks import run_ranks
from runs import largest_error, make_config, make_trainer, write_data

LAYERS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


Step = tuple[dict[str, Tensor], float]


STAGES = ("lighthouse", "lighthouse", "dense", "lighthouse")


def steps(
    config: RunConfig, backend: str, rank: int, stages: Sequence[StageMode] = STAGES
) -> tuple[list[Step], dict[str, int]]:
    """Gradients and loss of a step in each of `stages`, then an evaluation; and how often things happened."""
    counts = {"select": 0, "attend": 0, "fetch": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            counts[name] += 1
            return function(*args)

        return call

    reference.select = counted("select", reference.select)
    for exchange in (LocalExchange, RingExchange):
        exchange.forward = counted("attend", exchange.forward)
    offload.InputOffload._fetch = counted("fetch", offload.InputOffload._fetch)
    parallelize.torch.compile = partial(torch.compile, backend=backend)
    counters.clear()
    trainer = make_trainer(config)
    found = []
    for step, mode in enumerate(stages):
        loss = trainer.gradients(step, trainer.attention(mode))
        found.append(({name: full(p.grad) for name, p in trainer.model.named_parameters()}, float(loss)))
    if "dense" in stages:
        attended = counts["attend"]
        trainer.held_out("dense")
        counts["attend"] = attended
    counts["graphs"] = counters["stats"]["unique_graphs"]
    return found, counts


@pytest.fixture(scope="module")
def plain(data: Path) -> list[Step]:
    config = make_config(data, 1, 1, compile=False)
    return run_ranks(1, partial(steps, config, "inductor"))[0][0]


MEMORY = {
    "none": {"recompute": "none"},
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "some": {"recompute": "selective", "recompute_layers": 2},
    "offload": {"recompute": "full", "offload_layers": 3},
    "offload-two": {"recompute": "selective", "offload_layers": 2},
    "offload-some": {"recompute": "selective", "recompute_layers": 2, "offload_layers": 1},
}
EAGER = [(memory, False, *layout) for layout in [(1, 1), (1, 2)] for memory in MEMORY] + [("offload", False, 2, 1)]
COMPILED = [(memory, True, 1, 2) for memory in ("none", "offload-some", "offload")] + [("selective", True, 2, 1)]


@pytest.mark.parametrize(("memory", "compiled", "dp", "cp"), EAGER + COMPILED)
def test_every_combination_computes_the_same(
    data: Path, plain: list[Step], memory: str, compiled: bool, dp: int, cp: int
) -> None:
    """Layer 0 is dense, the others Lighthouse; parameters are sharded over the ranks (FSDP2)."""
    settings = MEMORY[memory]
    config = make_config(data, dp, cp, memory=settings, compile=compiled)
    passes = 4 // dp  # micro-batches of one sequence
    for found, counts in run_ranks(dp * cp, partial(steps, config, "aot_eager")):
        for (gradients, loss), (expected, expected_loss) in zip(found, plain, strict=True):
            assert largest_error(gradients, expected) <= 1e-12
            assert loss == pytest.approx(expected_loss, rel=1e-12)
        # Three Lighthouse steps select, in two layers, and once: a layer that runs again does not. (What a compiled
        # layer calls counts, too: the op's body runs at run time alone.)
        assert counts["select"] == 3 * passes * (LAYERS - 1)
        again = config.recomputed_layers if settings["recompute"] == "full" else 0
        assert counts["attend"] == 4 * passes * (LAYERS + again)
        # The last layer's input, where it is offloaded, is still on the device when backward begins.
        assert counts["fetch"] == 4 * passes * min(LAYERS - 1, settings.get("offload_layers", 0))
        if compiled:
            kinds = 2 if "recompute_layers" in settings else 1
            # Dense and Lighthouse layers of each kind, with gradients; dense without; the loss: not one a layer.
            assert counts["graphs"] <= 1 + 3 * kinds


def test_the_dilated_scorer_is_not_kept_and_changes_nothing(data: Path) -> None:
    """Its two exchanges are not among what `selective` keeps, nor what a compiled layer could move."""
    attention = {"num_levels": 3, "pooling_factor": 3, "topk": 24, "num_strata": 8, "scorer": "dilated", "dilation": 5}
    plain = make_config(data, 1, 1, compile=False, attention=attention)
    ((expected, _),) = run_ranks(1, partial(steps, plain, "inductor"))
    settings = {"memory": MEMORY["offload-some"], "parallel": {"cp": 2, "sharding": "contiguous"}}
    config = make_config(data, 1, 2, compile=True, attention=attention, **settings)
    for found, counts in run_ranks(2, partial(steps, config, "aot_eager")):
        for (gradients, loss), (reference_gradients, reference_loss) in zip(found, expected, strict=True):
            assert largest_error(gradients, reference_gradients) <= 1e-12
            assert loss == pytest.approx(reference_loss, rel=1e-12)
        assert counts["attend"] == 4 * 4 * LAYERS + 3 * 4 * 2 * (LAYERS - 1)


def test_inductor_computes_the_same(data: Path, plain: list[Step]) -> None:
    memory = {"recompute": "selective", "recompute_layers": 2, "offload_layers": 1}
    config = make_config(data, 1, 1, memory=memory, compile=True)
    ((found, _),) = run_ranks(1, partial(steps, config, "inductor", stages=STAGES[:1]), timeout=240)
    for (gradients, loss), (expected, expected_loss) in zip(found, plain[:1], strict=True):
        assert largest_error(gradients, expected) <= 1e-12
        assert loss == pytest.approx(expected_loss, rel=1e-12)


@pytest.mark.parametrize(
    "memory", [{"offload_layers": 1}, {"recompute": "full", "recompute_layers": 4}, {"recompute_layers": 2}]
)
def test_settings_that_do_not_go_together_are_refused(data: Path, memory: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"memory\.(offload|recompute)_layers"):
        make_config(data, 1, 1, memory=memory)
