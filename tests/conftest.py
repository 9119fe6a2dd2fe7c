"""Settings for all tests."""

from __future__ import annotations

import os

# Several ranks share the cores, and a process is forked safely only without a thread pool.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("lhcp", deadline=None, derandomize=True)
settings.load_profile("lhcp")


def pytest_configure(config: pytest.Config) -> None:
    # Once a process has used CUDA, as any backward pass does where there is a GPU, no process forked from it can.
    if not any("gpu" in argument for argument in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults", "how much is broken (tests/dist/test_faults.py)")
    group.addoption("--kills", type=int, default=30, help="kill -9 in runs, at random moments")
    group.addoption("--damages", type=int, default=200, help="flipped bits and cut files, at random places")
    group.addoption("--fault-seed", type=int, default=0, help="of these moments and places")
