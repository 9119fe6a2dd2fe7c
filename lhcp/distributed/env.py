"""The processes of a run, as torchrun describes them in the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from lhcp.config import ConfigError

DeviceChoice = Literal["auto", "cpu", "cuda"]
# How many collectives torch remembers, to be written when a run hangs; at the second name, older, it warns.
_RECORDER = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_RECORDED = "2000"
# How the allocator is told to let segments grow: layers and the loss need blocks of different sizes, which fragment.
_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@dataclass(frozen=True)
class ProcessEnv:
    """This process among the others; alone when torchrun did not start it."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int = 1
    """Processes on this machine."""

    @classmethod
    def read(cls) -> ProcessEnv:
        """From RANK, LOCAL_RANK and WORLD_SIZE.

        Raises:
            ConfigError: Slurm started several tasks without torchrun, each of which would train alone.
        """
        if "WORLD_SIZE" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
            raise ConfigError(
                "srun started several tasks, but WORLD_SIZE is not set; start one torchrun per node with srun, and "
                "lhcp.train with torchrun"
            )
        return cls(*(int(os.environ.get(name, default)) for name, default in
                     (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1"))))  # fmt: skip

    def device(self, choice: DeviceChoice) -> torch.device:
        """The device of this process; `auto` takes its GPU where there is one.

        Raises:
            ConfigError: `cuda` without a GPU for this process.
        """
        gpus = 0 if choice == "cpu" else torch.cuda.device_count()
        if choice == "cpu" or (choice == "auto" and gpus == 0):
            return torch.device("cpu")
        if self.local_rank >= gpus:
            remedy = f"start at most {gpus} processes here, or set" if gpus else "set"
            raise ConfigError(
                f"device {choice}: local rank {self.local_rank} has no GPU (this machine has {gpus}); {remedy} "
                f"device: cpu if the run is small enough (lhcp demo is)"
            )
        return torch.device("cuda", self.local_rank)


@contextmanager
def process_group(env: ProcessEnv, device: torch.device, timeout: timedelta | None = None) -> Iterator[None]:
    """The default process group: NCCL on GPUs, gloo on CPUs; one process needs no launcher.

    Args:
        env: of this process.
        device: of this process.
        timeout: limit for the other processes to come, and for one collective. None: torch's default.
    """
    if not any(name in os.environ for name in _RECORDER):
        os.environ[_RECORDER[0]] = _RECORDED
    backend = "gloo"
    if device.type == "cuda":
        if not any(name in os.environ for name in _ALLOCATOR):
            os.environ[_ALLOCATOR[0]] = "expandable_segments:True"
        torch.cuda.set_device(device)
        backend = "nccl"
    if env.world_size == 1 and "MASTER_ADDR" not in os.environ:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()
