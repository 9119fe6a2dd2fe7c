"""What torch's recorders of collectives and of memory wrote: they know no other format than a pickle."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NoReturn


class _Plain(pickle.Unpickler):
    """Of lists, dictionaries, words and numbers alone: nothing in the file is run."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


def plain(path: Path) -> dict[str, Any]:
    """The whole file."""
    found: dict[str, Any] = _Plain(io.BytesIO(path.read_bytes())).load()
    return found


def entries(path: Path) -> list[dict[str, Any]]:
    """The collectives that were noted, the oldest first."""
    return list(plain(path)["entries"])
