"""The zigzag ring of the package ring-flash-attn (github.com/zhuzilin/ring-flash-attention), with flash-attn's kernel.

It shards as `zigzag` does here. Its backward keeps a rank's own gradients in the buffers that travel, and rounds blocks
to the input's dtype. In float32 it would be wrong, had flash-attn such kernels: its `buffer.to(torch.float32)` is then
the buffer itself, which the next block overwrites. In float64 that rounds.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lhcp.config import ConfigError
from lhcp.distributed.sharding import ChunkLayout

INSTALL = "pip install 'lhcp[flash]' --no-build-isolation"


class PackageExchange:
    """The package's forward and backward.

    A rank sends (W - 1) x (k and v) in forward, and in backward the same again plus W x their gradients in float32.

    Raises:
        ConfigError: a layout that it does not know, or the package cannot be imported.
    """

    def __init__(self, group: ProcessGroup | None, layout: ChunkLayout) -> None:
        if layout.sharding != "zigzag":
            raise ConfigError(f"exchange 'ring_flash_attn' needs sharding 'zigzag', not {layout.sharding!r}")
        if group is None:
            raise ConfigError("exchange 'ring_flash_attn' needs a process group")
        self._group, self._package = group, load_package()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `Exchange.forward`."""
        if q.dtype not in (torch.bfloat16, torch.float16):
            raise ConfigError(f"exchange 'ring_flash_attn' takes bfloat16 or float16, not {q.dtype}; use 'ring'")
        if (width := q.shape[-1]) % 8 or width > 256:
            raise ConfigError(
                f"exchange 'ring_flash_attn' takes a head_dim that is a multiple of 8 and at most 256, not {width}; "
                f"use 'ring'"
            )
        out, lse = self._package.zigzag_ring_flash_attn_forward(
            self._group, q.contiguous(), k.contiguous(), v.contiguous(), 1 / math.sqrt(q.shape[-1])
        )
        return out, lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Exchange.backward`."""
        q, k, v, grad = (x.contiguous() for x in (q, k, v, grad))
        gradients: tuple[Tensor, Tensor, Tensor] = self._package.zigzag_ring_flash_attn_backward(
            self._group, grad, q, k, v, out, lse, 1 / math.sqrt(q.shape[-1]),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return gradients


def load_package() -> ModuleType:
    """The module with the package's zigzag ring.

    Raises:
        ConfigError: it, or something that it imports, is missing.
    """
    try:
        return importlib.import_module("ring_flash_attn.zigzag_ring_flash_attn")
    except ImportError as error:
        raise ConfigError(
            f"exchange 'ring_flash_attn' needs the packages flash-attn, ring-flash-attn and transformers before 5.4 "
            f"({error}); install them by {INSTALL}, or use exchange 'ring'"
        ) from None
