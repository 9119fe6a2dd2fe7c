"""A model whose output weight is its embedding, sharded: one parameter, with the gradients of both uses."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lhcp.attention.layers import layer_attentions
from lhcp.config import RunConfig
from lhcp.data import TokenDataset, sequence_ids
from lhcp.distributed import ContextParallel
from lhcp.model.llama import Llama
from lhcp.parallelize import full
from ranks import run_ranks
from runs import largest_error, make_config, make_trainer, write_data
from saved_models import assert_same, random_model, save_model, tensors_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def make_tied(data: Path, dp: int, cp: int, **changes: object) -> RunConfig:
    model = make_config(data, 1, 1).model.model_dump() | {"tie_embeddings": True} | changes
    return make_config(data, dp, cp, model=model, stages=[{"mode": "dense", "steps": 10}])


def second_step(config: RunConfig, rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights after the first step, which must not part the two, and the gradients there."""
    trainer = make_trainer(config)
    trainer.train_step()
    assert trainer.model.output.weight is trainer.model.embedding.weight
    weights = {name: full(p.detach()).clone() for name, p in trainer.model.named_parameters()}
    trainer.gradients(1, trainer.attention("dense"))
    return weights, {name: full(p.grad) for name, p in trainer.model.named_parameters()}


def plain_gradients(config: RunConfig, weights: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    """Of the mean loss, by one process without FSDP2 and with two matrices."""
    untied = Llama(config.model.model_copy(update={"tie_embeddings": False})).double()
    untied.load_state_dict(weights | {"output.weight": weights["embedding.weight"]})
    dataset, n = TokenDataset(config.data.path, "train"), config.seq_len
    stream = torch.from_numpy(dataset.read(0, dataset.num_tokens))
    ids = sequence_ids(config.seed, step, config.global_batch_size, dataset.num_sequences(n)).tolist()
    tokens, labels = (torch.stack([stream[i * n + shift : (i + 1) * n + shift] for i in ids]) for shift in (0, 1))
    attention = layer_attentions(config.model.num_layers, ContextParallel(), None)
    loss = untied(tokens, labels, torch.arange(n), attention) / labels.numel()
    loss.backward()
    found = {name: p.grad for name, p in untied.named_parameters() if p.grad is not None}
    found["embedding.weight"] += found.pop("output.weight")
    return found


@pytest.mark.parametrize(("dp", "cp"), [(1, 1), (2, 1), (1, 2)])
def test_gradients_are_those_of_one_process(data: Path, dp: int, cp: int) -> None:
    config = make_tied(data, dp, cp)
    for weights, found in run_ranks(dp * cp, partial(second_step, config)):
        assert "output.weight" not in found
        expected = plain_gradients(config, weights, 1)
        assert largest_error(found, expected) < 1e-12


def start(config: RunConfig, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    model = make_trainer(config).model
    return full(model.output.weight).detach(), {name: full(p).detach() for name, p in model.named_parameters()}


def test_a_run_starts_from_a_tied_checkpoint(data: Path, tmp_path: Path) -> None:
    """Written by one process, read by two."""
    model = make_tied(data, 1, 1).model
    tensors = {name: tensor.double() for name, tensor in tensors_of(random_model(model)).items()}
    save_model(model, tmp_path / "start", tensors)
    config = make_tied(data, 1, 2, init_from=tmp_path / "start")
    for output, parameters in run_ranks(2, partial(start, config)):
        assert torch.equal(output, tensors["model.embedding.weight"])
        assert_same({f"model.{name}": parameter for name, parameter in parameters.items()}, tensors)
