"""What torch's flight recorder wrote: it knows no other format than a pickle."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any, NoReturn


class _Plain(pickle.Unpickler):
    """Of lists, dictionaries, words and numbers alone: nothing in the file is run."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"{module}.{name} is not plain data")


def entries(path: Path) -> list[dict[str, Any]]:
    """The collectives that were noted, the oldest first."""
    trace = _Plain(io.BytesIO(path.read_bytes())).load()
    return list(trace["entries"])
