"""Every Triton kernel against its specification, in Triton's interpreter: no GPU needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).parents[1]


def test_kernels_equal_the_specification_in_the_interpreter() -> None:
    """In processes of their own: Triton decides at import whether it interprets. Side by side: it takes its time."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    files = ("tests/kernel_cases.py", "tests/kernel_layer_cases.py")
    processes = [
        subprocess.Popen([*command, file], env=environment, cwd=TESTS.parent, stdout=subprocess.PIPE, text=True)
        for file in files
    ]
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-6000:]
        assert " passed" in output
