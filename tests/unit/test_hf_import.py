"""Imports: either spelling of a config.json is read, and everything that lhcp cannot compute is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lhcp import cli, config_file
from lhcp.checkpoint.folder import FOLDER, step_folder
from lhcp.checkpoint.manifest import Checkpoint
from lhcp.config import ConfigError, LinearRopeScaling, ModelConfig
from lhcp.files import DamagedError
from lhcp.hf import importer
from lhcp.hf.config import from_hf
from lhcp.hf.export import export_model
from lhcp.hf.importer import import_model
from saved import read_all
from saved_models import LLAMA3, MODELS, PLAIN, assert_same, random_model, save_model, tensors_of

Values = dict[str, Any]
# What Llama 2 7B says of itself, in the spelling of transformers 4.28.
LLAMA2 = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0,
    "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.28.1",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
WIDE = ModelConfig(
    vocab_size=32_000, dim=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, ffn_dim=11_008
)
ROPE_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
WITHOUT_LENGTH = {key: value for key, value in ROPE_LLAMA3.items() if key != "original_max_position_embeddings"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"num_key_value_heads": 8, "head_dim": 64}, {"num_kv_heads": 8, "head_dim": 64}),
        ({"head_dim": None, "num_key_value_heads": None, "rope_scaling": None}, {}),
        ({"rope_theta": 500_000}, {"rope_theta": 500_000.0}),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}, "rope_theta": 8.0}, {"rope_theta": 7.0}),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": LinearRopeScaling(factor=2.0)}),
        ({"rope_scaling": ROPE_LLAMA3, "rope_theta": 9.0}, {"rope_scaling": LLAMA3, "rope_theta": 9.0}),
        ({"rope_parameters": {**ROPE_LLAMA3, "rope_theta": 9.0}}, {"rope_scaling": LLAMA3, "rope_theta": 9.0}),
        (
            {"rope_parameters": WITHOUT_LENGTH},
            {"rope_scaling": LLAMA3.model_copy(update={"original_max_position_embeddings": 4096})},
        ),
        ({"rms_norm_eps": None}, {"norm_eps": 1e-6}),
        ({"tie_word_embeddings": True, "quantization_config": None, "mlp_bias": False}, {"tie_embeddings": True}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_every_spelling_is_read(changes: Values, expected: Values) -> None:
    assert from_hf(LLAMA2 | changes) == (WIDE.model_copy(update=expected), 4096)


WRONG_CONFIGS: dict[str, tuple[Values, str]] = {
    "another model": ({"model_type": "mistral"}, 'model_type: given "mistral", must be "llama"'),
    "no model": ({"model_type": None}, 'model_type: given null, must be "llama"'),
    "another activation": ({"hidden_act": "gelu"}, 'hidden_act: given "gelu", must be "silu"'),
    "biases in attention": ({"attention_bias": True}, "attention_bias: given true, must be false"),
    "biases in the FFN": ({"mlp_bias": True}, "mlp_bias: given true, must be false"),
    "quantized": ({"quantization_config": {"bits": 4}}, 'quantization_config: given {"bits": 4}, must be null'),
    "partial RoPE": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: given 0.5, must be 1"),
    "dynamic RoPE": (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        'rope_scaling.rope_type: given "dynamic", must be one of "default", "linear", "llama3"',
    ),
    "YaRN": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        'rope_parameters.rope_type: given "yarn", must be one of "default", "linear", "llama3"',
    ),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: required"),
    "small factor": (
        {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
        "rope_parameters.factor: given 0.5, must be greater than or equal to 1",
    ),
    "frequencies": (
        {"rope_scaling": ROPE_LLAMA3 | {"high_freq_factor": 1}},
        "high_freq_factor 1 must be greater than low_freq_factor 1",
    ),
    "RoPE is no object": ({"rope_scaling": [1]}, "rope_scaling: given [1], must be an object with a rope_type"),
    "no positions": (
        {"max_position_embeddings": None},
        "max_position_embeddings: given null, must be a whole number of at least 1",
    ),
    "no width": ({"hidden_size": None}, "hidden_size: required"),
    "not a number": ({"vocab_size": "many"}, 'vocab_size: given "many", must be a valid integer'),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers: given 0, must be greater than or equal to 1"),
    "width and heads": ({"num_attention_heads": 48, "num_key_value_heads": 8}, "head_dim: required"),
    "KV heads": (
        {"num_key_value_heads": 5},
        "num_kv_heads 5 does not divide num_heads 32; valid: [1, 2, 4, 8, 16, 32]",
    ),
    "odd heads": ({"head_dim": 65}, "head_dim: given 65, must be a multiple of 2"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS.keys())
def test_what_cannot_be_computed_is_refused(tmp_path: Path, changes: Values, message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2 | changes))
    refused(tmp_path, tmp_path / "out", f"{tmp_path / 'config.json'}: {message}")


def refused(hf_dir: Path, out: Path, start: str) -> None:
    """One message that begins so, and nothing written."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(ConfigError) as caught:
        import_model(hf_dir, out)
    assert str(caught.value).startswith(start)
    assert "pydantic" not in str(caught.value)
    assert sorted(out.parent.iterdir()) == before


def test_each_error_has_its_line(tmp_path: Path) -> None:
    values = {key: value for key, value in LLAMA2.items() if key not in ("hidden_size", "vocab_size")}
    (tmp_path / "config.json").write_text(json.dumps(values))
    path = tmp_path / "config.json"
    refused(tmp_path, tmp_path / "out", f"{path}: vocab_size: required\n{path}: hidden_size: required\n")


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    """An export in several files, with its checkpoint beside it."""
    checkpoint = save_model(PLAIN, tmp_path / "checkpoint", tensors_of(random_model(PLAIN)))
    export_model(checkpoint, tmp_path / "hf", max_shard_bytes=50_000)
    return tmp_path / "hf"


def change_tensors(hf_dir: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Put all tensors, changed, into one file."""
    tensors = {name: tensor for file in hf_dir.glob("*.safetensors") for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, hf_dir / "model.safetensors")


def set_config(hf_dir: Path, **values: object) -> None:
    path = hf_dir / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_one_file_is_read_before_several(tmp_path: Path, hf_dir: Path) -> None:
    """As transformers does."""
    change_tensors(hf_dir, lambda tensors: tensors["model.norm.weight"].fill_(3.5))
    tensors = read_all(import_model(hf_dir, tmp_path / "out"))
    assert tensors["model.norm.weight"].unique().tolist() == [3.5]


def test_mixed_dtypes_become_float32(tmp_path: Path, hf_dir: Path) -> None:
    names = {"model.layers.0.self_attn.k_proj.weight": torch.bfloat16, "model.norm.weight": torch.float16}

    def lower(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensors[name].to(dtype) for name, dtype in names.items()})

    change_tensors(hf_dir, lower)
    found, expected = read_all(import_model(hf_dir, tmp_path / "out")), tensors_of(random_model(PLAIN))
    expected["model.blocks.0.attention.qkv.weight"][40:60] = (
        expected["model.blocks.0.attention.qkv.weight"][40:60].bfloat16().float()
    )
    expected["model.norm.weight"] = expected["model.norm.weight"].half().float()
    assert_same(found, expected)


def test_frequencies_in_old_files_are_ignored(tmp_path: Path, hf_dir: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)

    change_tensors(hf_dir, add)
    assert_same(read_all(import_model(hf_dir, tmp_path / "out")), tensors_of(random_model(PLAIN)))


@pytest.mark.parametrize("same", [True, False], ids=["same", "different"])
def test_the_output_of_a_tied_model(tmp_path: Path, hf_dir: Path, same: bool) -> None:
    """Some files hold it all the same."""
    set_config(hf_dir, tie_word_embeddings=True)
    if same:
        change_tensors(hf_dir, lambda tensors: tensors["lm_head.weight"].copy_(tensors["model.embed_tokens.weight"]))
        found = read_all(import_model(hf_dir, tmp_path / "out"))
        assert "model.output.weight" not in found
        assert_same(found, tensors_of(random_model(MODELS["tied"])) | found)
    else:
        message = (
            f"{hf_dir}: config.json says tie_word_embeddings: true, but lm_head.weight is not "
            f"model.embed_tokens.weight; set it to false"
        )
        refused(hf_dir, tmp_path / "out", message)


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]


def drop_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        del tensors[name]


def add_biases(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.q_proj.bias"] = torch.ones(40)
    tensors["score.weight"] = torch.ones(3)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.k_proj.weight"] = torch.ones(40, 32)


def to_bytes(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)


WRONG_TENSORS = {
    "missing": (drop, "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight"),
    "many missing": (
        drop_layer,
        "missing: model.layers.1.input_layernorm.weight, model.layers.1.self_attn.q_proj.weight, "
        "model.layers.1.self_attn.k_proj.weight, model.layers.1.self_attn.v_proj.weight and 5 more",
    ),
    "no output": (
        lambda tensors: tensors.pop("lm_head.weight"),
        "missing: lm_head.weight; or config.json must say tie_word_embeddings: true",
    ),
    "unexpected": (
        add_biases,
        "no part of the model in config.json: model.layers.1.self_attn.q_proj.bias, score.weight",
    ),
    "shape": (reshape, "of another shape: model.layers.1.self_attn.k_proj.weight (40, 32), not (20, 32)"),
    "dtype": (to_bytes, "of a dtype that is none of F16, BF16, F32, F64: lm_head.weight I8"),
}


@pytest.mark.parametrize(("change", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS.keys())
def test_other_tensors_are_refused(tmp_path: Path, hf_dir: Path, change: Any, message: str) -> None:
    change_tensors(hf_dir, change)
    refused(hf_dir, tmp_path / "out", f"{hf_dir}: tensors {message}")


def test_pickles_are_refused(tmp_path: Path, hf_dir: Path) -> None:
    for file in hf_dir.glob("model*"):
        file.unlink()
    refused(hf_dir, tmp_path / "out", f"no model.safetensors and no model.safetensors.index.json in {hf_dir}")
    (hf_dir / "pytorch_model.bin").write_bytes(b"never read")
    message = (
        f"{hf_dir} has its weights only as pytorch_model.bin: pickles, which can run any code when they are read. Co"
    )
    refused(hf_dir, tmp_path / "out", message)


def test_wrong_files(tmp_path: Path, hf_dir: Path) -> None:
    out, index = tmp_path / "out", hf_dir / "model.safetensors.index.json"
    refused(tmp_path / "no", out, f"no config.json in {tmp_path / 'no'}; name the folder of a Hugging Face model")
    shard = next(hf_dir.glob("model-00002-*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-7])
    refused(hf_dir, out, f"{shard} is damaged or not a safetensors file (")
    shard.unlink()
    refused(hf_dir, out, f"{shard} is missing, but model.safetensors.index.json lists it")
    index.write_text('{"weight_map": {"a": "../elsewhere.safetensors"}}')
    refused(hf_dir, out, f"{index}: weight_map must give the names of files beside it")
    index.write_text('{"weight_map": 3}')
    refused(hf_dir, out, f"{index}: weight_map must be an object")
    index.write_text("{")
    refused(hf_dir, out, f"{index}: not JSON (")
    (hf_dir / "config.json").write_text("[]")
    refused(hf_dir, out, f"{hf_dir / 'config.json'}: must hold a JSON object")


def test_what_is_there_is_kept(tmp_path: Path, hf_dir: Path) -> None:
    (tmp_path / "out").mkdir()
    refused(hf_dir, tmp_path / "out", f"{tmp_path / 'out'} exists; name another folder")


def test_a_full_disk_leaves_nothing(tmp_path: Path, hf_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk(importer.CheckpointWriter):
        def finish(self, **written: Any) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(importer, "CheckpointWriter", FullDisk)
    refused(hf_dir, tmp_path / "out", f"{tmp_path / 'out'} cannot be written ([Errno 28] No space left on device)")


@pytest.mark.filterwarnings("error")
def test_the_commands(tmp_path: Path) -> None:
    """From a run folder to Hugging Face and back, and the lines of YAML that start a run."""
    run = tmp_path / "run"
    (run / FOLDER).mkdir(parents=True)
    models = {step: tensors_of(random_model(PLAIN, seed=step)) for step in (3, 12)}
    for step, tensors in models.items():
        save_model(PLAIN, step_folder(run, step), tensors)

    def lhcp(*words: object) -> str:
        result = CliRunner().invoke(cli.app, list(map(str, words)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    text = lhcp("export", run, "--to", tmp_path / "hf")
    assert text.splitlines() == [
        f"{tmp_path / 'hf'}: Llama of 32,736 parameters for up to 512 tokens, step 7",
        "  weights    float32, 1 file(s), 0.13 MB",
        "  tokenizer  byte-level",
    ]
    assert_same(read_all(import_model(tmp_path / "hf", tmp_path / "newest")), models[12])
    lhcp("export", run, "--step", 3, "--to", tmp_path / "hf3", "--dtype", "bfloat16")
    lhcp("export", step_folder(run, 3), "--to", tmp_path / "hf3-again", "--dtype", "bfloat16")
    for folder in ("hf3", "hf3-again"):
        (weights,) = (tmp_path / folder).glob("*.safetensors")
        assert torch.equal(load_file(weights)["lm_head.weight"], models[3]["model.output.weight"].bfloat16())

    text = lhcp("import", tmp_path / "hf", "--to", tmp_path / "start")
    assert text.startswith(
        f"{tmp_path / 'start'}: Llama of 32,736 parameters for up to 512 tokens\n  weights    float32, "
    )
    lines = yaml.safe_load(text.partition("\n\n")[2].partition("\n\n")[2])
    rest = {"output_dir": "x", "seq_len": 64, "global_batch_size": 1, "data": {"path": "x"},
            "stages": [{"mode": "dense", "steps": 1}]}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(lines | rest))
    model = config_file.load(tmp_path / "run.yaml").model
    assert model == PLAIN.model_copy(update={"init_from": tmp_path / "start"})


def test_a_model_that_transformers_5_does_not_read_is_exported_with_a_note(tmp_path: Path) -> None:
    config = PLAIN.model_copy(update={"num_heads": 6})
    save_model(config, tmp_path / "checkpoint", tensors_of(random_model(config)), data=None)
    result = CliRunner().invoke(cli.app, ["export", str(tmp_path / "checkpoint"), "--to", str(tmp_path / "hf")])
    assert result.output.splitlines()[2:] == [
        "  tokenizer  none: the checkpoint does not say which",
        "  note       transformers 5 reads no model whose num_heads does not divide its dim; transformers 4 does",
    ]
    assert import_model(tmp_path / "hf", tmp_path / "again").manifest.model == config


def test_which_checkpoint_is_exported(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "hf"

    def message_of(*words: object) -> str:
        result = CliRunner().invoke(cli.app, ["export", *map(str, words), "--to", str(out)])
        assert isinstance(result.exception, ConfigError), result.output
        assert not out.exists()
        return str(result.exception)

    assert message_of(run) == f"{run}: no such folder; name a run folder or a checkpoint"
    (run / FOLDER).mkdir(parents=True)
    assert (
        message_of(run, "--step", 3)
        == f"{run} has no checkpoint after 3 steps; valid: none, it is no run folder with checkpoints"
    )
    for step in (3, 12):
        save_model(PLAIN, step_folder(run, step), tensors_of(random_model(PLAIN)))
    assert message_of(run, "--step", 5) == f"{run} has no checkpoint after 5 steps; valid: 3, 12"
    (step_folder(run, 12) / "rank-00000.safetensors").unlink()
    with pytest.raises(DamagedError):
        Checkpoint.open(step_folder(run, 12)).verify()
    assert message_of(run).startswith(f"{step_folder(run, 12) / 'rank-00000.safetensors'} cannot be read")
