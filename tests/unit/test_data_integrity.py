"""No damaged byte of a dataset goes unnoticed."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from damage import damage
from lhcp.config import ConfigError
from lhcp.data import TokenDataset, prepare, read_index, verify_shards
from lhcp.files import DamagedError

REMEDY = "; copy it again, or make the dataset again with `lhcp data prepare`"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Some thousand tokens in shards of 500, in both splits."""
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"document {number}, " * 10)
    prepare([tmp_path], tmp_path / "data", held_out=0.3, shard_tokens=500)
    return tmp_path / "data"


def complaint(folder: Path, ranks: int = 1) -> str:
    """What a run says that opens and verifies the dataset; nothing when it finds it whole."""
    try:
        for rank in range(ranks):
            TokenDataset(folder, "train")
            TokenDataset(folder, "held_out")
            verify_shards(folder, rank, ranks)
    except ConfigError as error:
        return str(error)
    return ""


def shards(folder: Path) -> list[str]:
    return [shard.file for _, split in sorted(read_index(folder).splits.items()) for shard in split.shards]


def test_any_damage_is_found(folder: Path) -> None:
    """Flips, cuts and additions anywhere in any file; the message names the file."""
    random = Random(0)
    files = sorted(folder.iterdir())
    assert {"index.json", "index.json.sha256", *shards(folder)} == {file.name for file in files}
    assert len([file for file in files if file.name.startswith("held_out")]) >= 2
    for file in files * -(-300 // len(files)):
        whole = file.read_bytes()
        done = damage(file, random)
        assert file.read_bytes() != whole, done
        said = complaint(folder, ranks=random.randint(1, 4))
        assert said, f"not found: {done}"
        # Of an index and its checksum that do not fit each other, either may be wrong.
        named = file.with_suffix("") if file.suffix == ".sha256" else file
        assert said.startswith(f"{named} "), done
        assert said.endswith(REMEDY), done
        file.write_bytes(whole)
        assert complaint(folder) == ""


def test_any_bit_of_a_small_dataset(tmp_path: Path) -> None:
    """Every one of them."""
    (tmp_path / "a.txt").write_text("abc")
    folder = tmp_path / "data"
    prepare([tmp_path / "a.txt"], folder, held_out=0, shard_tokens=3)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for bit in range(8 * len(whole)):
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            with pytest.raises(DamagedError):
                verify_shards(folder)
        file.write_bytes(whole)
    verify_shards(folder)


@pytest.mark.parametrize("parts", [1, 2, 3, 100])
def test_ranks_share_the_work(folder: Path, parts: int) -> None:
    """Each shard is read by one rank: that of its number modulo the ranks."""
    for number, name in enumerate(shards(folder)):
        file = folder / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 2]))
        for part in range(parts):
            if part == number % parts:
                with pytest.raises(DamagedError, match=f"{name} is damaged: its sha256 is not that of what was writt"):
                    verify_shards(folder, part, parts)
            else:
                verify_shards(folder, part, parts)
        file.write_bytes(whole)


def test_a_shard_of_another_size_says_so(folder: Path) -> None:
    shard = folder / shards(folder)[0]
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DamagedError) as caught:
        verify_shards(folder)
    assert str(caught.value) == f"{shard} is damaged: it has 998 bytes, and 1000 were written{REMEDY}"


def test_missing_files(folder: Path) -> None:
    shard = folder / shards(folder)[-1]
    shard.unlink()
    with pytest.raises(DamagedError) as caught:
        verify_shards(folder)
    assert str(caught.value) == f"{shard} cannot be read (No such file or directory){REMEDY}"

    (folder / "index.json.sha256").unlink()
    with pytest.raises(DamagedError) as caught:
        TokenDataset(folder, "train")
    assert str(caught.value) == f"{folder}/index.json.sha256 cannot be read (No such file or directory){REMEDY}"

    (folder / "index.json").unlink()
    with pytest.raises(ConfigError, match=r"no dataset in .* \(it has no index\.json\); make one with"):
        verify_shards(folder)


def test_shards_that_changed_places(folder: Path) -> None:
    """Equal sizes, and only tokens of the vocabulary."""
    first, second = folder / "train-00000.bin", folder / "train-00001.bin"
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    TokenDataset(folder, "train")
    with pytest.raises(DamagedError, match=f"{first.name} is damaged"):
        verify_shards(folder)


def test_a_damaged_dataset_can_be_replaced(folder: Path) -> None:
    (folder / "index.json.sha256").write_text("")
    prepare([folder.parent], folder, held_out=0.3, overwrite=True)
    assert complaint(folder) == ""
