"""The benchmark of whole steps: what it measures, and that it measures nothing where gradients are wrong."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist

from benchmarks import train_step
from lhcp import config_file, offload
from lhcp.config import MemoryConfig
from ranks import run_ranks
from runs import make_config, write_data

SETTINGS = ("--memory", "none", "--memory", "selective:2:1", "--memory", "full")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = write_data(tmp_path_factory.mktemp("data"))
    path = data.parent / "run.yaml"
    config_file.save(
        make_config(data, 1, 1, dtype="float32", compile=False, optim={"warmup_steps": 0, "lr": 3e-3}), path
    )
    return path


def start(arguments: list[str], broken: bool, rank: int) -> int:
    dist.destroy_process_group()  # it makes its own
    if broken:
        send = offload.InputOffload._send
        offload.InputOffload._send = lambda self, layer, x: send(self, layer, x.roll(1, 1))
    return train_step.main(arguments)


def run(*arguments: str | Path, broken: bool = False) -> int:
    return run_ranks(1, partial(start, [str(word) for word in arguments], broken))[0]


def test_both_modes_are_measured_at_the_fastest_setting(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    assert run(config, "--out", out, "--steps", "6", *SETTINGS) == 0
    result = json.loads(out.read_text())
    assert result["check"]["passed"]
    assert [one["memory"]["offload_layers"] for one in result["check"]["settings"]] == [0, 1, 0]
    assert all(0 <= one["gradient_error"] <= 1e-5 for one in result["check"]["settings"])
    for mode in ("lighthouse", "dense"):
        best = result["modes"][mode]
        everything = [best, *best["tried"]]
        assert {one["memory"]["recompute"] for one in everything} == {"none", "selective", "full"}
        assert best["step"]["p50_ms"] == min(one["step"]["p50_ms"] for one in everything)
        assert best["tokens_per_s_per_gpu"] == pytest.approx(4 * 360 / best["step"]["p50_ms"] * 1e3)
        for one in everything:
            assert len(one["losses"]) == 6
            assert one["losses"][-1] < one["losses"][0] - 0.1
            assert one["losses"] == pytest.approx(best["losses"], rel=1e-3)
            assert one["offloaded_gib"] == one["memory"]["offload_layers"] * 360 * 24 * 4 / 2**30
    assert result["modes"]["lighthouse"]["losses"] != result["modes"]["dense"]["losses"]


def test_nothing_is_timed_where_gradients_are_wrong(config: Path, tmp_path: Path) -> None:
    """Here a layer's input comes back by a token too late; without offload nothing is wrong."""
    out = tmp_path / "steps.json"
    assert run(config, "--out", out, "--steps", "3", *SETTINGS, broken=True) == 1
    result = json.loads(out.read_text())
    assert "modes" not in result
    errors = [one["gradient_error"] for one in result["check"]["settings"]]
    assert errors[1] > train_step.GRADIENT_TOLERANCE > max(errors[0], errors[2])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--modes", "sparse"], "--modes sparse: must be of lighthouse and dense"),
        (["--steps", "2"], "--steps 2: must be at least 3"),
        (["--memory", "some"], "--memory some: RECOMPUTE[:RECOMPUTE_LAYERS[:OFFLOAD_LAYERS]]"),
        (["--memory", "full:x"], "--memory full:x: RECOMPUTE"),
        (["--memory", "none:0:2"], "memory.offload_layers 2: only layers that are recomputed can be offloaded, here 0"),
        (["--memory", "full:4"], "memory.recompute_layers 4: the model has 3 layers"),
    ],
)
def test_wrong_arguments_are_one_message(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert train_step.main([str(config), "--out", str(tmp_path / "out.json"), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_a_short_run_shows_what_the_settings_do(config: Path) -> None:
    """Of the four layers that are checked some keep all, and some of the recomputed are not offloaded."""
    given = config_file.load(config)
    many = given.model_copy(update={"model": given.model.model_copy(update={"num_layers": 30})})
    for memory, layers, offloaded in [
        (MemoryConfig(recompute="full"), 4, 0),
        (MemoryConfig(recompute="full", recompute_layers=12), 3, 0),
        (MemoryConfig(recompute="selective", offload_layers=28), 4, 2),
        (MemoryConfig(recompute="selective", offload_layers=30), 4, 4),
        (MemoryConfig(recompute="full", recompute_layers=12, offload_layers=1), 3, 1),
        (MemoryConfig(), 0, 0),
    ]:
        short = train_step.shortened(many.model_copy(update={"memory": memory}).resolve(1))
        assert (short.recomputed_layers, short.memory.offload_layers) == (layers, offloaded)
        short.resolve(1)


def test_losses_that_are_not_finite_are_no_measurement(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "steps.json"
    flags = ("--set", "optim.lr=1e12", "--set", "optim.max_skipped_steps=100")
    assert run(config, "--out", out, "--steps", "5", "--modes", "dense", *flags) == 2
    assert not out.exists()
