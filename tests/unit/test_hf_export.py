"""Exports: which row goes where, files of any size and dtype, all or nothing, and one of them in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lhcp.checkpoint.manifest import Checkpoint, DataEntry
from lhcp.checkpoint.storage import CheckpointWriter
from lhcp.config import ConfigError, ModelConfig
from lhcp.files import DamagedError
from lhcp.hf import export
from lhcp.hf.config import to_hf
from lhcp.hf.export import export_model
from lhcp.hf.importer import import_model
from lhcp.hf.names import hf_tensors, our_tensors
from lhcp.model.llama import Llama
from ranks import run_ranks
from saved import read_all
from saved_models import (
    LLAMA3,
    MODELS,
    PLAIN,
    assert_same,
    make_manifest,
    random_model,
    save_model,
    tensors_of,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return save_model(PLAIN, tmp_path / "checkpoint", tensors_of(random_model(PLAIN)))


def json_of(folder: Path, name: str = "config.json") -> dict[str, object]:
    values = json.loads((folder / name).read_text())
    assert isinstance(values, dict)
    return values


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_rows_by_hand(tmp_path: Path, checkpoint: Checkpoint) -> None:
    """4 query heads and 2 KV heads of width 10, FFN 44."""
    export_model(checkpoint, tmp_path / "hf")
    found, ours = weights_of(tmp_path / "hf"), tensors_of(random_model(PLAIN))
    qkv, gate_up = ours["model.blocks.1.attention.qkv.weight"], ours["model.blocks.1.feed_forward.gate_up.weight"]
    expected = {
        "self_attn.q_proj": qkv[:40], "self_attn.k_proj": qkv[40:60], "self_attn.v_proj": qkv[60:],
        "self_attn.o_proj": ours["model.blocks.1.attention.out.weight"],
        "mlp.gate_proj": gate_up[:44], "mlp.up_proj": gate_up[44:],
        "mlp.down_proj": ours["model.blocks.1.feed_forward.down.weight"],
        "input_layernorm": ours["model.blocks.1.attention_norm.weight"],
        "post_attention_layernorm": ours["model.blocks.1.feed_forward_norm.weight"],
    }  # fmt: skip
    layer = {name: tensor for name, tensor in found.items() if name.startswith("model.layers.1.")}
    assert_same(layer, {f"model.layers.1.{name}.weight": tensor for name, tensor in expected.items()})
    rest = {name: tensor for name, tensor in found.items() if ".layers." not in name}
    outside = {"model.embed_tokens": "embedding", "model.norm": "norm", "lm_head": "output"}
    assert_same(rest, {f"{name}.weight": ours[f"model.{mine}.weight"] for name, mine in outside.items()})


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
def test_every_row_has_one_place(config: ModelConfig) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(random_model(config)).items()}
    theirs, joined = hf_tensors(config), our_tensors(config)
    assert joined.keys() == shapes.keys()
    for name, parts in joined.items():
        row = 0
        for part in parts:
            assert theirs[part].tensor == name
            assert theirs[part].start == row
            assert theirs[part].shape[1:] == shapes[name][1:]
            row += theirs[part].shape[0]
        assert row == shapes[name][0]


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_import_of_an_export_is_the_checkpoint(tmp_path: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) + 1e-9 for name, tensor in tensors_of(random_model(config)).items()}
    optimizer = {f"optimizer.exp_avg.{name}": -tensor for name, tensor in tensors.items()}
    original = save_model(config, tmp_path / "a", tensors | optimizer)
    export_model(original, tmp_path / "hf", max_shard_bytes=20_000)
    again = import_model(tmp_path / "hf", tmp_path / "b")
    assert_same(read_all(again), tensors)
    manifest = again.manifest
    assert (manifest.model, manifest.seq_len, manifest.step) == (config, 512, 0)
    assert (manifest.config, manifest.data, manifest.model.init_from) == (None, None, None)
    again.verify()


@pytest.mark.parametrize("limit", [1, 6_000, 20_000, 10**9])
def test_files_hold_at_most_the_limit(tmp_path: Path, checkpoint: Checkpoint, limit: int) -> None:
    done = export_model(checkpoint, tmp_path / "hf", max_shard_bytes=limit)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) == done.files
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = [opened.get_tensor(name).nbytes for name in opened.keys()]  # noqa: SIM118
        assert sum(sizes) <= limit or len(sizes) == 1
    assert sum(tensor.nbytes for tensor in weights_of(tmp_path / "hf").values()) == done.weight_bytes
    assert done.weight_bytes == 4 * done.parameters == 4 * sum(x.numel() for x in random_model(PLAIN).parameters())
    if limit == 10**9:
        assert [file.name for file in files] == ["model.safetensors"]
        assert not (tmp_path / "hf" / "model.safetensors.index.json").exists()
        return
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    index = json_of(tmp_path / "hf", "model.safetensors.index.json")
    assert index["metadata"] == {"total_size": done.weight_bytes}
    where = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == where


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "float32"])
def test_dtype(tmp_path: Path, checkpoint: Checkpoint, dtype: export.ExportDtype) -> None:
    done = export_model(checkpoint, tmp_path / "hf", dtype)
    export_model(checkpoint, tmp_path / "saved")
    rounded = {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights_of(tmp_path / "saved").items()}
    assert_same(weights_of(tmp_path / "hf"), rounded)
    values = json_of(tmp_path / "hf")
    assert (done.dtype, values["dtype"], values["torch_dtype"]) == (dtype, dtype, dtype)


def test_files_beside_the_weights(tmp_path: Path, checkpoint: Checkpoint) -> None:
    assert export_model(checkpoint, tmp_path / "hf").has_tokenizer
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"}
    found = {path.name for path in (tmp_path / "hf").iterdir()}
    assert found == {"model.safetensors", "config.json"} | tokenizer
    assert json_of(tmp_path / "hf") == to_hf(PLAIN, 512, "float32", 256)
    assert json_of(tmp_path / "hf", "generation_config.json") == {"eos_token_id": 256}


@pytest.mark.parametrize("data", [None, DataEntry(fingerprint="0", tokenizer="other", vocab_size=200)])
def test_without_a_known_tokenizer_there_is_none(tmp_path: Path, data: DataEntry | None) -> None:
    other = save_model(PLAIN, tmp_path / "checkpoint", tensors_of(random_model(PLAIN)), data)
    assert not export_model(other, tmp_path / "hf").has_tokenizer
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {"model.safetensors", "config.json"}
    values = json_of(tmp_path / "hf")
    assert (values["eos_token_id"], values["bos_token_id"]) == (None, None)


def test_rope_is_in_both_spellings() -> None:
    plain = PLAIN.model_copy(update={"rope_theta": 900.0})
    values = to_hf(plain.model_copy(update={"rope_scaling": LLAMA3}), 512, "float32", None)
    llama3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
              "original_max_position_embeddings": 64}  # fmt: skip
    assert (values["rope_theta"], values["rope_scaling"]) == (900.0, llama3)
    assert values["rope_parameters"] == {"rope_theta": 900.0, **llama3}
    values = to_hf(plain, 512, "float32", None)
    assert (values["rope_theta"], values["rope_scaling"]) == (900.0, None)
    assert values["rope_parameters"] == {"rope_theta": 900.0, "rope_type": "default"}


def write_on_ranks(folder: Path, config: ModelConfig, rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    sharded = {
        name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors_of(random_model(config)).items()
    }
    save(sharded, storage_writer=CheckpointWriter(folder, rank, make_manifest(config)))


@pytest.mark.parametrize("world", [2, 3, 4])
def test_export_does_not_depend_on_who_wrote(tmp_path: Path, checkpoint: Checkpoint, world: int) -> None:
    """257 rows of the vocabulary and 80 of q, k and v: no rank's share ends where a tensor of the export does."""
    run_ranks(world, lambda rank: write_on_ranks(tmp_path / "sharded", PLAIN, rank, world))
    assert len(list((tmp_path / "sharded").glob("rank-*"))) == world
    for source, out in ((checkpoint, "one"), (Checkpoint.open(tmp_path / "sharded"), "many")):
        export_model(source, tmp_path / out, max_shard_bytes=20_000)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "many").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes(), name


def test_others_can_read_it(tmp_path: Path, checkpoint: Checkpoint) -> None:
    before = os.umask(0o027)
    try:
        export_model(checkpoint, tmp_path / "hf")
    finally:
        os.umask(before)
    assert (tmp_path / "hf").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "hf").iterdir()} == {0o640}


def test_an_empty_folder_is_taken_and_parents_are_made(tmp_path: Path, checkpoint: Checkpoint) -> None:
    (tmp_path / "empty").mkdir()
    export_model(checkpoint, tmp_path / "empty")
    export_model(checkpoint, tmp_path / "a" / "b")
    assert_same(weights_of(tmp_path / "empty"), weights_of(tmp_path / "a" / "b"))


@pytest.mark.parametrize("taken", ["folder", "file"])
def test_what_is_there_is_kept(tmp_path: Path, checkpoint: Checkpoint, taken: str) -> None:
    out = tmp_path / "out"
    kept = out / "kept" if taken == "folder" else out
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(ConfigError, match=r"out exists and is not an empty folder; name another$"):
        export_model(checkpoint, out)
    assert kept.read_text() == "mine"


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, checkpoint: Checkpoint) -> None:
    path = checkpoint.folder / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedError, match=r"rank-00000\.safetensors is damaged"):
        export_model(checkpoint, tmp_path / "hf")
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_all_or_nothing(tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at the second file."""
    original = export.save_file

    def full_disk(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        original(tensors, path, metadata=metadata)
        if "-00002-of-" in path.name:
            raise SafetensorError("No space left on device")

    (tmp_path / ".hf.tmp").mkdir()
    (tmp_path / ".hf.tmp" / "of a killed export").write_text("")
    monkeypatch.setattr(export, "save_file", full_disk)
    with pytest.raises(ConfigError, match=r"model-00002-of-\d+\.safetensors cannot be written \(No space left"):
        export_model(checkpoint, tmp_path / "hf", max_shard_bytes=20_000)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]
    monkeypatch.undo()
    export_model(checkpoint, tmp_path / "hf")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint", "hf"]


MEASURED = """\
import sys
from pathlib import Path
from lhcp.checkpoint.manifest import Checkpoint
from lhcp.hf import export

def held():
    \"\"\"Bytes of memory of this process that are no file's.\"\"\"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

def watched(function):
    def call(*args, **kwargs):
        global peak
        result = function(*args, **kwargs)
        peak = max(peak, held())
        return result
    return call

export.read_tensor, export._load = watched(export.read_tensor), watched(export._load)
folder = Path(sys.argv[1])
for number, limit in enumerate((8_000_000, 10**9)):
    before = peak = held()
    export.export_model(Checkpoint.open(folder / "checkpoint"), folder / str(number), max_shard_bytes=limit)
    print(peak - before)
"""


def test_memory_holds_one_file(tmp_path: Path) -> None:
    """Of a model of 97 MB, whose largest tensor has 5 MB, in files of 8 MB; all of it where that is one file."""
    config = ModelConfig(vocab_size=512, dim=512, num_layers=8, num_heads=4, num_kv_heads=4, head_dim=128, ffn_dim=1280)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in tensors_of(Llama(config)).items()}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    sizes = [tensor.nbytes for tensor in tensors.values()]
    save_model(config, tmp_path / "checkpoint", tensors)
    at_once = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    done = subprocess.run(command, env=at_once, capture_output=True, check=True, text=True)
    small, large = map(int, done.stdout.split())
    assert small < 8_000_000 + max(sizes) + 1_500_000
    assert large > 0.99 * sum(sizes) > 90_000_000
    shutil.rmtree(tmp_path)  # else pytest keeps it, 300 MB
