"""Checkpoint folders, and what a resumed run may change; whole runs are in tests/dist."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lhcp.checkpoint.compare import check_meaning
from lhcp.checkpoint.folder import FOLDER, prune, published, remove_leftovers, set_aside, step_folder, unpublished
from lhcp.checkpoint.manifest import Checkpoint, DataEntry, Manifest
from lhcp.checkpoint.resume import candidates, first_readable
from lhcp.checkpoint.storage import CheckpointReader, CheckpointWriter
from lhcp.checks import check_files, data_entry
from lhcp.config import ConfigError, RunConfig
from lhcp.files import DamagedError, read_checked, write_checked
from ranks import run_ranks
from runs import make_config, write_data
from saved import published_tensors

SHAPES = {"three": (3, 5), "odd": (257, 2), "one": (1, 1), "even": (8, 2), "vector": (6,)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def numbered(value: float | None = None) -> dict[str, Tensor]:
    """Sharded over all ranks; some have nothing of the small ones. Counting up, or all `value`."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = {name: torch.arange(float(torch.Size(shape).numel())).reshape(shape) for name, shape in SHAPES.items()}
    return {
        name: distribute_tensor(x if value is None else torch.full_like(x, value), mesh, [Shard(0)])
        for name, x in whole.items()
    }


def manifest(config: RunConfig, step: int = 1) -> Manifest:
    return Manifest(
        created="2026-01-01", step=step, model=config.model, seq_len=config.seq_len, versions={},
        config=config.model_dump(mode="json"), data=data_entry(config),
    )  # fmt: skip


def write(folder: Path, config: RunConfig, rank: int) -> None:
    save(numbered(), storage_writer=CheckpointWriter(folder, rank, manifest(config)))


def read(folder: Path, rank: int) -> dict[str, Tensor]:
    tensors = numbered(value=float("nan"))
    load(tensors, storage_reader=CheckpointReader(Checkpoint.open(folder)))
    return {name: x.full_tensor() for name, x in tensors.items()}


def test_any_number_of_ranks_reads_what_any_number_wrote(data: Path, tmp_path: Path) -> None:
    (expected,) = run_ranks(1, lambda rank: {name: x.full_tensor() for name, x in numbered().items()})
    for writers in (1, 2, 4):
        folder = step_folder(tmp_path / str(writers), 1)
        folder.parent.mkdir(parents=True)
        run_ranks(writers, partial(write, folder, make_config(data, 1, 1)))
        assert len(list(folder.glob("rank-*.safetensors"))) == writers
        whole = published_tensors(tmp_path / str(writers), 1)
        assert all(torch.equal(whole[name], expected[name]) for name in SHAPES)
        for readers in (1, 3):
            for found in run_ranks(readers, partial(read, folder)):
                assert all(torch.equal(found[name], expected[name]) for name in SHAPES)


def test_files_are_readable_as_the_umask_says(data: Path, tmp_path: Path) -> None:
    def with_umask(rank: int) -> None:
        os.umask(0o027)
        write(tmp_path / "step-00000001", make_config(data, 1, 1), rank)

    run_ranks(1, with_umask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "step-00000001").iterdir()} == {0o640}


def test_a_checkpoint_is_never_overwritten(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir()

    def refused(rank: int) -> str:
        try:
            write(folder, make_config(data, 1, 1), rank)
        except BaseException as error:  # DCP's own derives from BaseException
            return str(error)
        return ""

    assert "exists" in run_ranks(1, refused)[0]
    assert list(folder.iterdir()) == []


def make_steps(run_dir: Path, *steps: int) -> None:
    for step in steps:
        step_folder(run_dir, step).mkdir(parents=True)
        (step_folder(run_dir, step) / "file").touch()


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / FOLDER).iterdir())


def test_published_are_those_with_a_final_name(tmp_path: Path) -> None:
    assert published(tmp_path) == []
    make_steps(tmp_path, 100, 20, 123_456_789)
    unpublished(step_folder(tmp_path, 30)).mkdir()
    (tmp_path / FOLDER / "notes.txt").touch()
    assert published(tmp_path) == [20, 100, 123_456_789]


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    make_steps(tmp_path, 1, 2, 3, 10)
    prune(tmp_path / FOLDER, 2)
    assert names(tmp_path) == ["step-00000003", "step-00000010"]


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    make_steps(tmp_path, 1, 2)
    unpublished(step_folder(tmp_path, 3)).mkdir()
    (tmp_path / FOLDER / ".step-00000000.old").mkdir()
    (tmp_path / FOLDER / ".mine").mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [".mine", "step-00000001", "step-00000002"]


def test_newer_checkpoints_are_set_aside_under_names_that_are_free(tmp_path: Path) -> None:
    make_steps(tmp_path, 1, 2, 3)
    assert [path.name for path in set_aside(tmp_path, 2)] == ["set-aside-1-step-00000003"]
    make_steps(tmp_path, 3)
    assert [path.name for path in set_aside(tmp_path, 2)] == ["set-aside-2-step-00000003"]
    assert set_aside(tmp_path, 2) == []
    assert published(tmp_path) == [1, 2]


def test_which_checkpoints_a_run_goes_on_from(tmp_path: Path) -> None:
    assert candidates(tmp_path, "last") == candidates(tmp_path, "last-good") == []
    make_steps(tmp_path, 1, 2, 30)
    assert candidates(tmp_path, "last") == [step_folder(tmp_path, 30)]
    assert candidates(tmp_path, "last-good") == [step_folder(tmp_path, step) for step in (30, 2, 1)]
    assert candidates(tmp_path, "2") == [step_folder(tmp_path, 2)]
    with pytest.raises(
        ConfigError, match=r"--resume 3: .* no checkpoint after 3 steps; valid: last, last-good, 1, 2, 30$"
    ):
        candidates(tmp_path, "3")
    with pytest.raises(ConfigError, match="--resume latest: must be last, last-good or the number of steps"):
        candidates(tmp_path, "latest")


def write_manifest(run_dir: Path, config: RunConfig, step: int) -> Path:
    folder = step_folder(run_dir, step)
    folder.mkdir(parents=True)
    write_checked(folder / "manifest.json", manifest(config, step).model_dump_json())
    return folder


def test_damaged_manifests(data: Path, tmp_path: Path) -> None:
    config = make_config(data, 1, 1)
    first, second = (write_manifest(tmp_path, config, step) for step in (1, 2))
    (second / "manifest.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"step-00000002/manifest.json .* damaged(.|\n)*--resume last-good$"):
        first_readable(tmp_path, "last")
    readable = first_readable(tmp_path, "last-good")
    assert readable is not None
    assert readable.folder == first
    (first / "manifest.json.sha256").unlink()
    with pytest.raises(
        DamagedError, match=r"no checkpoint in .* is whole; choose another output_dir(.|\n)*step-00000001"
    ):
        first_readable(tmp_path, "last-good")


def test_a_checkpoint_of_another_format_is_told_apart_from_damage(data: Path, tmp_path: Path) -> None:
    folder = write_manifest(tmp_path, make_config(data, 1, 1), 1)
    newer = read_checked(folder / "manifest.json").replace('"format_version":1', '"format_version":2')
    write_checked(folder / "manifest.json", newer)
    with pytest.raises(ConfigError, match="not of this version of lhcp") as caught:
        Checkpoint.open(folder)
    assert not isinstance(caught.value, DamagedError)
    with pytest.raises(ConfigError, match=r"no checkpoint in .*nothing"):
        Checkpoint.open(tmp_path / "nothing")


def test_files_are_those_of_its_own_folder(data: Path, tmp_path: Path) -> None:
    folder = write_manifest(tmp_path, make_config(data, 1, 1), 1)
    outside = read_checked(folder / "manifest.json").replace('"files":{}', '"files":{"../x":{"bytes":1,"sha256":""}}')
    write_checked(folder / "manifest.json", outside)
    with pytest.raises(ConfigError, match="not of this version of lhcp"):
        Checkpoint.open(folder)


ATTENTION = {"num_levels": 3, "pooling_factor": 3, "topk": 24, "num_strata": 8}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"attention": ATTENTION | {"num_strata": 4}}, "attention.num_strata: 8 in the checkpoint, 4 now"),
        ({"attention": ATTENTION | {"topk": 40}}, "attention.topk: 24 in the checkpoint, 40 now"),
        (
            {"attention": ATTENTION | {"cover_prefix": False}},
            "attention.cover_prefix: True in the checkpoint, False now",
        ),
        ({"attention": ATTENTION | {"num_levels": 2}}, "attention.num_levels: 3 in the checkpoint, 2 now"),
        ({"dense_layers": []}, "dense_layers: [0] in the checkpoint, [] now"),
        ({"seed": 1}, "seed: 0 in the checkpoint, 1 now"),
        ({"global_batch_size": 8}, "global_batch_size: 4 in the checkpoint, 8 now"),
        ({"dtype": "float32"}, "dtype: 'float64' in the checkpoint, 'float32' now"),
    ],
)
def test_what_changes_the_meaning_is_refused_unless_allowed_by_name(
    data: Path, tmp_path: Path, changes: dict[str, Any], line: str
) -> None:
    write_manifest(tmp_path, make_config(data, 1, 1), 1)
    config = make_config(data, 1, 1, output_dir=tmp_path, **changes)
    key = line.partition(":")[0]
    with pytest.raises(ConfigError) as caught:
        check_files(config, "last")
    assert line in str(caught.value)
    assert str(caught.value).endswith(f"go on with these values all the same: --allow-change {key}")
    check_files(config, "last", [key])
    check_files(config, "last", [key.partition(".")[0]])


def test_every_change_is_named(data: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path, make_config(data, 1, 1), 1)
    config = make_config(data, 1, 1, output_dir=tmp_path, attention=ATTENTION | {"pooling_factor": 2, "num_strata": 6})
    with pytest.raises(ConfigError) as caught:
        check_files(config, "last", ["attention.num_strata"])
    assert str(caught.value).splitlines()[1:] == [
        "attention.pooling_factor: 3 in the checkpoint, 2 now",
        "set them back, or go on with these values all the same: --allow-change attention.pooling_factor",
    ]


def test_weights_that_do_not_fit_are_never_allowed(data: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path, make_config(data, 1, 1), 1)
    model = make_config(data, 1, 1).model.model_dump()
    fewer = make_config(data, 1, 1, output_dir=tmp_path, model=model | {"num_layers": 2})
    with pytest.raises(ConfigError, match=r"do not fit the changed model.num_layers; set it back, or start"):
        check_files(fewer, "last", ["model"])
    other = make_config(data, 1, 1, output_dir=tmp_path, model=model | {"rope_theta": 5e5})
    with pytest.raises(ConfigError, match=r"--allow-change model.rope_theta"):
        check_files(other, "last")
    check_files(other, "last", ["model.rope_theta"])


def test_other_data_is_refused(data: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path, make_config(data, 1, 1), 1)
    checkpoint, config = Checkpoint.open(step_folder(tmp_path, 1)), make_config(data, 1, 1)
    entry = data_entry(config)
    for key, value in (("fingerprint", "0" * 64), ("tokenizer", "other"), ("vocab_size", 300)):
        with pytest.raises(ConfigError, match=f"data.{key}: (.|\n)* --allow-change data.{key}"):
            check_meaning(checkpoint, config, entry.model_copy(update={key: value}), [])
        check_meaning(checkpoint, config, entry.model_copy(update={key: value}), ["data"])
    with pytest.raises(ConfigError, match=r"data.fingerprint: [0-9a-f]{12}... in the checkpoint, 0{12}... now"):
        check_meaning(checkpoint, config, entry.model_copy(update={"fingerprint": "0" * 64}), [])
    assert check_meaning(checkpoint, config, entry, []) == []


def test_what_changes_no_meaning_is_told(data: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path, make_config(data, 1, 1), 1)
    config = make_config(
        data, 2, 2, output_dir=tmp_path, optim={"lr": 1.0}, stages=[{"mode": "dense", "steps": 5}],
        memory={"recompute": "full", "offload_layers": 1}, compile=False, profile={"steps": "2:3"},
        attention=ATTENTION | {"max_cp": 4, "check_finite": True},
    )  # fmt: skip
    changes = check_meaning(Checkpoint.open(step_folder(tmp_path, 1)), config, data_entry(config), [])
    assert {key for key, _, _ in changes} == {
        "output_dir", "optim.lr", "optim.warmup_steps", "stages", "memory.recompute", "memory.offload_layers",
        "compile", "profile.steps", "attention.max_cp", "attention.check_finite", "parallel.dp", "parallel.cp",
    }  # fmt: skip


def test_a_run_cannot_be_shorter_than_it_is_already(data: Path, tmp_path: Path) -> None:
    config = make_config(data, 1, 1, output_dir=tmp_path)
    write_manifest(tmp_path, config, config.total_steps)
    check_files(config, "last")
    write_manifest(tmp_path, config, config.total_steps + 1)
    with pytest.raises(ConfigError, match="is after 21 steps, but the stages have 20 in all; lengthen one, or resume"):
        check_files(config, "last")


def test_only_what_is_held_fixed_can_be_allowed(data: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path, make_config(data, 1, 1), 1)
    config = make_config(data, 1, 1, output_dir=tmp_path)
    with pytest.raises(
        ConfigError, match=r"--allow-change optim.lr: not a key that is held fixed; valid: model, attention"
    ):
        check_files(config, "last", ["optim.lr"])


def test_a_run_folder_in_use_needs_resume(data: Path, tmp_path: Path) -> None:
    config = make_config(data, 1, 1, output_dir=tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(
        ConfigError, match="already holds a run; go on with it by --resume last, or choose another folder"
    ):
        check_files(config)
    check_files(config, "last")


def test_data_entry_is_that_of_the_index(data: Path) -> None:
    entry = data_entry(make_config(data, 1, 1))
    assert entry == DataEntry(fingerprint=entry.fingerprint, tokenizer="byte", vocab_size=257)
    assert len(entry.fingerprint) == 64
