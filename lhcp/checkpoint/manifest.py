"""What a checkpoint says about itself: `manifest.json`, checked against its own checksum. Imports no torch.

A checkpoint is a folder: `manifest.json` and `manifest.json.sha256`, `index.json` (which chunk of which tensor is in
which file), and one safetensors file for each rank that wrote one. Nothing in it is a pickle.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError

from lhcp.config import ConfigError, ModelConfig, Section, StageMode
from lhcp.files import DamagedError, check_file, read_checked

FORMAT_VERSION: Literal[1] = 1
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.json"

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
"""In the checkpoint's own folder."""
Count = Annotated[int, Field(ge=0)]


class FileEntry(Section):
    """One file of the checkpoint, as it was written."""

    bytes: Count
    sha256: str


class DataEntry(Section):
    """The tokens that the run trains on."""

    fingerprint: str
    """See `lhcp.data.DatasetIndex.fingerprint`."""
    tokenizer: str
    vocab_size: Count


class Manifest(Section):
    """The content of `manifest.json`. What an imported model does not have is None."""

    format_version: Literal[1] = FORMAT_VERSION
    created: str
    """ISO 8601, UTC."""
    step: Count = 0
    """Steps done, of the run's: the next is the step of this number, counted from 0."""
    stage: StageMode | None = None
    """Of the last step done."""
    seed: Count | None = None
    optimizer_steps: Count = 0
    """Of `step`, those that updated the weights."""
    skipped_in_a_row: Count = 0
    """Of `step`, the last so many that were not finite and left the weights alone."""
    model: ModelConfig
    seq_len: Annotated[int, Field(ge=1)]
    """Positions that the model has been trained for: N, or an imported model's own number."""
    config: dict[str, Any] | None = None
    """The resolved configuration."""
    data: DataEntry | None = None
    layout: dict[Literal["dp", "cp"], int] | None = None
    """Ranks that wrote it; any others can read it."""
    versions: dict[str, str]
    files: dict[FileName, FileEntry] = Field(default_factory=dict)
    """Every other file of the folder."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose manifest was read and found whole."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the manifest of the checkpoint in `folder`.

        Raises:
            ConfigError: there is none, or it is of another format version.
            DamagedError: the manifest is not what was written.
        """
        try:
            return cls(folder, Manifest.model_validate_json(read_checked(folder / MANIFEST_FILE)))
        except (FileNotFoundError, NotADirectoryError):
            if (folder / INDEX_FILE).exists():
                raise DamagedError(f"{folder} is damaged: it has no {MANIFEST_FILE}") from None
            raise ConfigError(f"no checkpoint in {folder}: it has no {MANIFEST_FILE}") from None
        except OSError as error:
            raise DamagedError(f"{folder / MANIFEST_FILE} cannot be read ({error.strerror})") from None
        except ValidationError as error:
            raise ConfigError(
                f"{folder / MANIFEST_FILE} is not of this version of lhcp (format {FORMAT_VERSION}): {error}"
            ) from None

    def verify(self, names: Iterable[str] | None = None) -> None:
        """Read files whole and compare them with their checksums; all of them when `names` is left out.

        Raises:
            DamagedError: naming the file.
        """
        for name in self.manifest.files if names is None else names:
            entry = self.manifest.files[name]
            check_file(self.folder / name, entry.bytes, entry.sha256)
