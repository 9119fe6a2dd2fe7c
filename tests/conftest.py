"""Settings for all tests."""

from __future__ import annotations

import os

# Several ranks share the cores, and a process is forked safely only without a thread pool.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("lhcp", deadline=None, derandomize=True)
settings.load_profile("lhcp")
