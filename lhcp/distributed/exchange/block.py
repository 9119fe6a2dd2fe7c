"""One attention block with its log-sum-exp, by a stock kernel.

All take [B, n, H, D] queries and [B, m, G, D] keys and values (G divides H; m = n when causal), scale by
1/sqrt(D), and return the output [B, n, H, D] with the log-sum-exp [B, H, n] in the accumulation dtype.
`backward` takes the *final* output and log-sum-exp of a query row, over all its blocks, and returns this
block's part of the gradients: that is what makes blocks add up.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from lhcp.config import BlockBackendName, ConfigError

aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]


class BlockBackend(Protocol):
    """See the module's docstring."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp."""

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> Gradients:
        """Gradients of q, k and v."""


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[B, H, n, D] views; the fused kernels read D as contiguous without checking that it is."""
    return [(x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in tensors]


class MathBackend:
    """Plain PyTorch: any device and dtype, memory n x m per head."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See `BlockBackend.forward`."""
        scores = self._scores(q, k, causal)
        lse = scores.logsumexp(-1)
        out = (scores - lse.unsqueeze(-1)).exp() @ self._grouped(v, v.shape[2])
        return self._flat(out).to(q.dtype), lse.flatten(1, 2)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> Gradients:
        """See `BlockBackend.backward`."""
        groups, scale = k.shape[2], 1 / math.sqrt(q.shape[-1])
        q_, k_, v_ = self._grouped(q, groups), self._grouped(k, groups), self._grouped(v, groups)
        grad_, out_ = self._grouped(grad, groups), self._grouped(out, groups)
        p = (self._scores(q, k, causal) - lse.unflatten(1, (groups, -1)).unsqueeze(-1)).exp()
        ds = p * (grad_ @ v_.mT - (grad_ * out_).sum(-1, keepdim=True)) * scale
        dk, dv = (ds.mT @ q_).sum(2, keepdim=True), (p.mT @ grad_).sum(2, keepdim=True)
        return self._flat(ds @ k_).to(q.dtype), self._flat(dk).to(k.dtype), self._flat(dv).to(v.dtype)

    def _scores(self, q: Tensor, k: Tensor, causal: bool) -> Tensor:
        groups = k.shape[2]
        scores: Tensor = self._grouped(q, groups) @ self._grouped(k, groups).mT / math.sqrt(q.shape[-1])
        if not causal:
            return scores
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(future, -math.inf)

    @staticmethod
    def _grouped(x_BNHD: Tensor, groups: int) -> Tensor:
        """[B, G, H / G, N, D] in the accumulation dtype."""
        x_BHND = x_BNHD.to(torch.promote_types(x_BNHD.dtype, torch.float32)).transpose(1, 2)
        x_BGRND: Tensor = x_BHND.unflatten(1, (groups, -1))
        return x_BGRND

    @staticmethod
    def _flat(x_BGRND: Tensor) -> Tensor:
        return x_BGRND.flatten(1, 2).transpose(1, 2)


class CpuBackend:
    """PyTorch's flash attention for CPUs: float64, float32, bfloat16."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See `BlockBackend.forward`."""
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(q, k, v), 0.0, causal)
        return out.transpose(1, 2), lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> Gradients:
        """See `BlockBackend.backward`."""
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_heads_first(grad, q, k, v, out), lse, 0.0, causal
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class FlashBackend:
    """FlashAttention-2 as shipped with PyTorch: CUDA, float16 and bfloat16."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See `BlockBackend.forward`."""
        out, lse, *_ = aten._scaled_dot_product_flash_attention(*_heads_first(q, k, v), 0.0, causal)
        return out.transpose(1, 2), lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> Gradients:
        """See `BlockBackend.backward`."""
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout: unused at rate 0
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            *_heads_first(grad, q, k, v, out),
            lse,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            causal,
            seed,
            seed,
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class CudnnBackend:
    """cuDNN's fused attention: CUDA, float16 and bfloat16; the fastest on Hopper and Blackwell."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """See `BlockBackend.forward`."""
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*_heads_first(q, k, v), None, True, 0.0, causal)
        return out.transpose(1, 2), lse.view(lse.shape[:3])

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
    ) -> Gradients:
        """See `BlockBackend.backward`."""
        seed = torch.empty((), dtype=torch.int64, device=q.device)  # of dropout: unused at rate 0
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            *_heads_first(grad, q, k, v, out), lse.unsqueeze(-1).contiguous(), seed, seed, None, None, None,
            q.shape[1], k.shape[1], 0.0, causal,
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


_BACKENDS: dict[str, BlockBackend] = {
    "math": MathBackend(),
    "cpu": CpuBackend(),
    "cudnn": CudnnBackend(),
    "flash": FlashBackend(),
}
_HALF = (torch.float16, torch.bfloat16)


def check_block_backend(name: str) -> None:
    """Refuse an unknown name.

    Raises:
        ConfigError: naming the valid ones.
    """
    if name not in (*_BACKENDS, "auto"):
        raise ConfigError(f"block_backend {name!r}: valid are {sorted([*_BACKENDS, 'auto'])}")


def block_backend(name: BlockBackendName, q: Tensor) -> BlockBackend:
    """The backend `name` for tensors like `q`; `auto`: cuDNN for half precision on CUDA, `cpu` on CPUs, else math.

    Where only deterministic algorithms may be used, `auto` takes flash in place of cuDNN.

    Raises:
        ConfigError: a backend that cannot take q's device or dtype, or whose backward is not deterministic.
    """
    on_cpu, half = q.device.type == "cpu", q.dtype in _HALF
    deterministic = torch.are_deterministic_algorithms_enabled()
    if name == "auto":
        name = "cpu" if on_cpu else "math" if not half else "flash" if deterministic else "cudnn"
    if name == "cudnn" and deterministic:
        raise ConfigError("block_backend 'cudnn' is not deterministic in backward; use 'auto' or 'flash'")
    if name == "cpu" and not on_cpu:
        raise ConfigError(f"block_backend 'cpu' cannot take tensors on {q.device}; use 'auto'")
    if name in ("cudnn", "flash") and (on_cpu or not half):
        raise ConfigError(
            f"block_backend {name!r} takes float16 or bfloat16 on CUDA, not {q.dtype} on {q.device}; use 'auto'"
        )
    return _BACKENDS[name]
