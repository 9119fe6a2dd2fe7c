"""One process at a time for a run folder. The system lets go of a lock when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lhcp.config import ConfigError
from lhcp.metrics import warn

LOCK_FILE = "lock"
_FLOCK = "hhqqi"
"""struct flock of Linux: type, whence, start, length, process."""


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run folder, made if needed, for this process.

    Raises:
        ConfigError: another process holds it, or it cannot be made or written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK_FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output_dir {run_dir} cannot be written ({error.strerror}); choose another") from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ConfigError(
                f"output_dir {run_dir} is in use by {holder(run_dir) or 'another process'}; wait for it to end, or "
                f"choose another folder"
            ) from None
        except OSError:
            warn(f"no lock on {run_dir}: its file system has none, so nothing keeps a second run out")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def holder(run_dir: Path) -> str | None:
    """The process that holds a run folder, as it wrote itself down; None where none does, or none can be seen.

    Not for that process itself, which would let go of its lock: closing the file does (POSIX).
    """
    try:
        with (run_dir / LOCK_FILE).open(encoding="utf-8") as file:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            found = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
            return None if found[0] == fcntl.F_UNLCK else file.read().strip()
    except OSError:
        return None
