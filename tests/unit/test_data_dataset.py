"""`TokenDataset`: one stream over shards, and what a user is told about a damaged dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lhcp.config import ConfigError
from lhcp.data import TokenDataset, prepare
from lhcp.files import write_checked

TEXT = "".join(chr(33 + i % 90) for i in range(99))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """100 train tokens in shards of 7, nothing held out."""
    (tmp_path / "a.txt").write_text(TEXT)
    prepare([tmp_path / "a.txt"], tmp_path / "data", held_out=0, shard_tokens=7)
    return tmp_path / "data"


def test_every_range(folder: Path) -> None:
    dataset = TokenDataset(folder, "train")
    stream = np.array([*TEXT.encode(), 256])
    assert (dataset.num_tokens, dataset.vocab_size) == (100, 257)
    assert len(list(folder.glob("*.bin"))) == 15
    for start in range(101):
        for stop in range(start, 101):
            piece = dataset.read(start, stop)
            assert piece.dtype == np.int64
            np.testing.assert_array_equal(piece, stream[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4), (0, 101), (101, 101)])
def test_bounds(folder: Path, start: int, stop: int) -> None:
    with pytest.raises(IndexError, match=rf"tokens \[{start}, {stop}\) are not inside the 100 of train"):
        TokenDataset(folder, "train").read(start, stop)


def test_a_token_beyond_the_vocabulary_names_its_shard(folder: Path) -> None:
    shard = folder / "train-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\xff\xff")
    dataset = TokenDataset(folder, "train")
    dataset.read(0, 13)
    with pytest.raises(ConfigError, match=r"train-00001\.bin holds token 65535, beyond its vocabulary"):
        dataset.read(13, 20)


def test_result_is_a_copy(folder: Path) -> None:
    dataset = TokenDataset(folder, "train")
    dataset.read(0, 5)[:] = -1
    assert dataset.read(0, 5).tolist() == list(TEXT[:5].encode())


def test_shards_are_mapped_when_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[str] = []
    memmap = np.memmap

    def record(file: Path, **rest: Any) -> Any:
        mapped.append(file.name)
        return memmap(file, **rest)

    monkeypatch.setattr(np, "memmap", record)
    dataset = TokenDataset(folder, "train")
    assert mapped == []
    dataset.read(13, 15)
    dataset.read(13, 15)
    assert mapped == ["train-00001.bin", "train-00002.bin"]


@pytest.mark.parametrize(("seq_len", "count"), [(1, 99), (9, 11), (10, 9), (33, 3), (99, 1), (100, 0)])
def test_num_sequences_leaves_a_last_label(folder: Path, seq_len: int, count: int) -> None:
    assert TokenDataset(folder, "train").num_sequences(seq_len) == count


def test_fingerprint(folder: Path, tmp_path: Path) -> None:
    first = TokenDataset(folder, "train").fingerprint
    assert len(bytes.fromhex(first)) == 32
    prepare([tmp_path / "a.txt"], tmp_path / "again", held_out=0, shard_tokens=7)
    assert TokenDataset(tmp_path / "again", "train").fingerprint == first
    (tmp_path / "a.txt").write_text(TEXT[:-1] + "!")
    prepare([tmp_path / "a.txt"], tmp_path / "other", held_out=0, shard_tokens=7)
    assert TokenDataset(tmp_path / "other", "train").fingerprint != first


def test_no_dataset(tmp_path: Path) -> None:
    message = r"no dataset in .*/absent \(the folder does not exist\); make one with `lhcp data prepare`"
    with pytest.raises(ConfigError, match=message):
        TokenDataset(tmp_path / "absent", "train")
    message = r"no dataset in .* \(it has no index\.json\); make one with `lhcp data prepare`"
    with pytest.raises(ConfigError, match=message):
        TokenDataset(tmp_path, "train")


def test_no_such_split(folder: Path) -> None:
    message = r"the dataset in .* has no held_out split; make it again with `lhcp data prepare` and a --held-out"
    with pytest.raises(ConfigError, match=message):
        TokenDataset(folder, "held_out")


@pytest.mark.parametrize("change", [{"format_version": 2}, {"unknown": 1}, {"vocab_size": "many"}, None])
def test_bad_index(folder: Path, change: dict[str, object] | None) -> None:
    content = json.loads((folder / "index.json").read_text())
    text = "{" if change is None else json.dumps({**content, **change})
    write_checked(folder / "index.json", text)
    message = r"index\.json is not a dataset index of format version 1; make the dataset again with `lhcp data prep"
    with pytest.raises(ConfigError, match=message):
        TokenDataset(folder, "train")


def test_damaged_shards(folder: Path) -> None:
    shard = folder / "train-00003.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    with pytest.raises(ConfigError, match=r"train-00003\.bin has 12 bytes, but the dataset's index says 14; copy it"):
        TokenDataset(folder, "train")
    shard.unlink()
    with pytest.raises(ConfigError, match=r"train-00003\.bin is missing, but the dataset's index lists it; copy it"):
        TokenDataset(folder, "train")
