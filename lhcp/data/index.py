"""`index.json`, the description of a prepared dataset: what is in its folder, checked against its own checksum."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from lhcp.config import ConfigError, Section
from lhcp.files import DamagedError, read_checked, write_checked

SplitName = Literal["train", "held_out"]
FORMAT_VERSION: Literal[1] = 1
INDEX_FILE = "index.json"
TOKEN_DTYPE = "<u2"
"""numpy dtype of tokens on disk: little-endian uint16."""
AGAIN = "copy it again, or make the dataset again with `lhcp data prepare`"
"""What to do about a file that is damaged or missing."""

Count = Annotated[int, Field(ge=0)]


class Shard(Section):
    """One file of tokens."""

    file: str
    """Name inside the dataset's folder."""
    tokens: Annotated[int, Field(ge=1)]
    bytes: Count
    """Size of the file."""
    sha256: str


class SplitIndex(Section):
    """One split: its tokens are those of its shards, in order."""

    shards: list[Shard]
    documents: Count
    text_bytes: Count
    """Bytes of the documents' text, without the ends of documents."""

    @property
    def tokens(self) -> int:
        """Tokens of all shards."""
        return sum(shard.tokens for shard in self.shards)


class SourceCounts(Section):
    """What was read to make the dataset."""

    files: Count
    documents: Count
    """Documents read, including those dropped."""
    duplicates: Count
    """Documents dropped since one with the same content was kept."""
    empty: Count
    """Documents dropped since they hold no text."""


class DatasetIndex(Section):
    """The content of `index.json`."""

    format_version: Literal[1] = FORMAT_VERSION
    tokenizer: str
    vocab_size: Annotated[int, Field(ge=1)]
    dtype: Literal["uint16"] = "uint16"
    splits: dict[SplitName, SplitIndex]
    sources: SourceCounts

    @property
    def fingerprint(self) -> str:
        """Identifies the tokens and their division into shards: sha256 (hex) over all shards' hashes."""
        lines = [f"{name} {shard.sha256}\n" for name, split in sorted(self.splits.items()) for shard in split.shards]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_index(folder: Path, index: DatasetIndex) -> None:
    """Write `folder`/index.json and its checksum, and wait until they are on the disk."""
    write_checked(folder / INDEX_FILE, index.model_dump_json(indent=2) + "\n")


def read_index(folder: Path) -> DatasetIndex:
    """Read `folder`/index.json.

    Raises:
        ConfigError: the folder or the file is missing, or the file is not an index of this format version.
        DamagedError: the file or its checksum is not what was written, or cannot be read.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        missing = f"it has no {INDEX_FILE}" if folder.is_dir() else "the folder does not exist"
        raise ConfigError(f"no dataset in {folder} ({missing}); make one with `lhcp data prepare`")
    try:
        return DatasetIndex.model_validate_json(read_checked(path))
    except DamagedError as error:
        raise DamagedError(f"{error}; {AGAIN}") from None
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror}); {AGAIN}") from None
    except ValueError as error:
        raise ConfigError(
            f"{path} is not a dataset index of format version {FORMAT_VERSION}; make the dataset again with "
            f"`lhcp data prepare`: {error}"
        ) from error
