"""`model: {init_from: DIR}`: the checkpoint brings the model's keys."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lhcp import config_file
from lhcp.checkpoint.folder import step_folder
from lhcp.config import ConfigError, ModelConfig
from lhcp.files import write_checked
from saved_models import LLAMA3, PLAIN, make_manifest

REST = """\
output_dir: runs/x
seq_len: 64
global_batch_size: 1
data: {path: data/x}
stages: [{mode: dense, steps: 2}]
"""
SCALED = PLAIN.model_copy(update={"rope_scaling": LLAMA3, "tie_embeddings": True, "norm_eps": 1e-6})


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A checkpoint, as far as a configuration needs it."""
    return write_manifest(tmp_path / "start", SCALED)


def write_manifest(folder: Path, model: ModelConfig) -> Path:
    folder.mkdir(parents=True)
    write_checked(folder / "manifest.json", make_manifest(model).model_dump_json())
    return folder


def load(folder: Path, model: str) -> ModelConfig:
    path = folder / "run.yaml"
    path.write_text(f"{REST}model: {{{model}}}\n")
    return config_file.load(path).model


def refusal(folder: Path, model: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, model)
    return str(caught.value)


def test_it_is_enough_alone(tmp_path: Path, start: Path) -> None:
    assert load(tmp_path, f"init_from: {start}") == SCALED.model_copy(update={"init_from": start})


def test_of_a_run_that_started_from_another(tmp_path: Path) -> None:
    """Where that one started is nothing to this run."""
    start = write_manifest(tmp_path / "start", SCALED.model_copy(update={"init_from": Path("long/gone")}))
    assert load(tmp_path, f"init_from: {start}").init_from == start


def test_equal_keys_may_be_given(tmp_path: Path, start: Path) -> None:
    """As numbers of any spelling, and as in the resolved configuration of a run."""
    assert load(tmp_path, f"init_from: {start}, dim: 32, norm_eps: 1e-6, rope_theta: 10000").dim == 32
    config = config_file.load(tmp_path / "run.yaml")
    config_file.save(config, tmp_path / "saved.yaml")
    assert config_file.load(tmp_path / "saved.yaml") == config


def test_a_run_that_has_begun_outlives_it(tmp_path: Path, start: Path) -> None:
    load(tmp_path, f"init_from: {start}")
    in_folder = [f"output_dir={tmp_path / 'run'}"]
    config = config_file.load(tmp_path / "run.yaml", in_folder)
    (tmp_path / "run").mkdir()
    config_file.save(config, tmp_path / "run" / "config.yaml")
    shutil.rmtree(start)
    assert config_file.load(tmp_path / "run" / "config.yaml") == config
    assert config_file.load(tmp_path / "run.yaml", in_folder) == config
    with pytest.raises(ConfigError, match=r"model.init_from: no checkpoint in"):
        config_file.load(tmp_path / "run.yaml", [f"output_dir={tmp_path / 'other'}"])


def test_keys_that_contradict_it_are_named(tmp_path: Path, start: Path) -> None:
    assert refusal(tmp_path, f"init_from: {start}, dim: 64, num_layers: 2, rope_scaling: null").splitlines() == [
        "model.dim: given 64, but the checkpoint in model.init_from has 32; remove it",
        "model.rope_scaling: given nothing, but the checkpoint in model.init_from has "
        "{'type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,...; remove it",
    ]


def test_wrong_keys_are_wrong_all_the_same(tmp_path: Path, start: Path) -> None:
    message = refusal(tmp_path, f"init_from: {start}, dim: wide, widht: 3")
    assert message.splitlines()[0] == "model.dim: given 'wide', must be a whole number"
    assert message.splitlines()[1].startswith("model.widht: unknown key; ")


def test_not_beside_a_preset(tmp_path: Path, start: Path) -> None:
    message = "model: preset and init_from are both given; init_from brings the whole shape, so leave preset out "
    assert refusal(tmp_path, f"preset: tiny, init_from: {start}").startswith(message)
    assert load(tmp_path, "preset: tiny, init_from: null").init_from is None
    (tmp_path / "run.yaml").write_text(f"{REST}model: {{preset: tiny}}\n")
    assert config_file.load(tmp_path / "run.yaml", [f"model={{init_from: {start}}}"]).model.dim == 32


def test_no_checkpoint_there(tmp_path: Path, start: Path) -> None:
    missing = tmp_path / "no"
    assert refusal(tmp_path, f"init_from: {missing}") == (
        f"model.init_from: no checkpoint in {missing}: it has no manifest.json"
    )
    for step in (3, 12):
        write_manifest(step_folder(tmp_path / "run", step), PLAIN)
    assert refusal(tmp_path, f"init_from: {tmp_path / 'run'}") == (
        f"model.init_from: no checkpoint in {tmp_path / 'run'}: it has no manifest.json; the newest of that run is "
        f"{step_folder(tmp_path / 'run', 12)}"
    )
    (start / "manifest.json").write_text("{}")
    assert refusal(tmp_path, f"init_from: {start}").startswith("model.init_from: ")
    assert "damaged" in refusal(tmp_path, f"init_from: {start}")
    assert refusal(tmp_path, "init_from: [1]").splitlines()[-1] == "model.init_from: given [1], must be a path"
