"""Files that say when they are damaged: checksums, and small files written with one beside them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from lhcp.config import ConfigError


class DamagedError(ConfigError):
    """A file is not what was written; the message names it."""


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, size: int, sha256: str) -> None:
    """Compare a file with what was recorded of it.

    Raises:
        DamagedError: it is missing, or its size in bytes or its sha256 differs.
    """
    try:
        found = path.stat().st_size
        if found != size:
            raise DamagedError(f"{path} is damaged: it has {found} bytes, and {size} were written")
        if sha256_of(path) != sha256:
            raise DamagedError(f"{path} is damaged: its sha256 is not that of what was written")
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror})") from None


def write_checked(path: Path, text: str) -> None:
    """Write `text` to `path` and its checksum to `path`.sha256 (as `sha256sum` prints it), and wait for the disk."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    for target, content in ((path, text), (checksum_file(path), f"{digest}  {path.name}\n")):
        with target.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def read_checked(path: Path) -> str:
    """The text of a file that `write_checked` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedError: it or its checksum file is not what was written.
    """
    content = path.read_bytes()
    try:
        recorded = checksum_file(path).read_bytes()
    except OSError as error:
        raise DamagedError(f"{checksum_file(path)} cannot be read ({error.strerror})") from None
    if recorded != f"{hashlib.sha256(content).hexdigest()}  {path.name}\n".encode():
        raise DamagedError(f"{path} or its .sha256 file is damaged: they do not fit each other")
    return content.decode()


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum_file(path: Path) -> Path:
    """Where `write_checked` puts the checksum of `path`."""
    return path.with_name(f"{path.name}.sha256")
