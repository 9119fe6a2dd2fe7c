"""A copy of the code that a run runs."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
BENCHMARKS = PACKAGE.resolve().parent / "benchmarks"
"""Only in a checkout: they are no part of the package that is installed."""
CODE_FOLDER = "code"
"""In a run folder."""


def copy_code(to: Path) -> None:
    """Copy the package to `to`/lhcp, so that `PYTHONPATH=to` runs it; nothing where there is a copy already.

    Links are followed: the copy has kernels, launch and slurm in it. From a checkout, benchmarks go along.

    Raises:
        OSError: it cannot be written.
    """
    if to.exists():
        return
    partial = to.with_name(f".{to.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(PACKAGE, partial / "lhcp", ignore=shutil.ignore_patterns("__pycache__"))
        if BENCHMARKS.is_dir():
            shutil.copytree(BENCHMARKS, partial / "benchmarks", ignore=shutil.ignore_patterns("__pycache__", "results"))
        partial.rename(to)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def code_digest(package: Path = PACKAGE) -> str:
    """Tells one state of the package's modules from another: 12 hex digits."""
    digest = hashlib.sha256()
    folders = (Path(folder) for folder, _, _ in os.walk(package, followlinks=True))
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]
