"""What the numbers of a run depend on besides its configuration."""

from __future__ import annotations

import platform
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch

from lhcp import __version__


def versions() -> dict[str, str]:
    """Of lhcp, Python and the libraries that compute, by name."""
    found = {"lhcp": __version__, "python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    return found | {"numpy": np.__version__}


def now() -> str:
    """ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
