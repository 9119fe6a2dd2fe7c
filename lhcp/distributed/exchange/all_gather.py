"""Attention after one all-gather of keys and values; in backward their gradients come back by a reduce-scatter.

The fewest and largest blocks, at the price of the keys and values of the whole sequence, and their gradients in the
accumulation dtype, on every rank; nothing overlaps. (Llama 3's context parallelism: arXiv:2407.21783, section 3.3.2.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lhcp.config import BlockBackendName
from lhcp.distributed.communicator import Communicator
from lhcp.distributed.exchange.block import block_backend
from lhcp.distributed.exchange.merge import Merge
from lhcp.distributed.order import joined, parted
from lhcp.distributed.sharding import ChunkLayout


class AllGatherExchange:
    """Each chunk of queries against itself and all that is before it.

    A rank sends (W - 1) x (k and v) in forward, and in backward the same again plus (W - 1) x their gradients in the
    accumulation dtype.
    """

    def __init__(self, communicator: Communicator, layout: ChunkLayout, backend: BlockBackendName) -> None:
        self._communicator, self._layout, self._backend = communicator, layout, backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """See `Exchange.forward`."""
        block = block_backend(self._backend, q)
        all_k, all_v = self._gathered(k, v)
        outs, lses = [], []
        for rows, start in self._chunks(q.shape[1]):
            merge = Merge(q[:, rows])
            merge.add(*block.forward(q[:, rows], k[:, rows], v[:, rows], causal=True))
            if start:
                merge.add(*block.forward(q[:, rows], all_k[:, :start], all_v[:, :start], causal=False))
            out, lse = merge.result()
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs, 1), torch.cat(lses, -1)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Exchange.backward`."""
        block = block_backend(self._backend, q)
        all_k, all_v = self._gathered(k, v)
        grad = grad.contiguous()
        dtype = torch.promote_types(q.dtype, torch.float32)
        dkv = torch.zeros(2, *all_k.shape, dtype=dtype, device=q.device)

        def step_back(rows: slice, start: int) -> Tensor:
            """dQ of one chunk."""
            queries = (grad[:, rows], q[:, rows])
            ends = (out[:, rows], lse[..., rows].contiguous())
            dq_, dk_, dv_ = block.backward(*queries, k[:, rows], v[:, rows], *ends, causal=True)
            dq = dq_.to(dtype)
            own = slice(start, start + dk_.shape[1])
            dkv[0, :, own] += dk_
            dkv[1, :, own] += dv_
            if start:
                dq_, dk_, dv_ = block.backward(*queries, all_k[:, :start], all_v[:, :start], *ends, causal=False)
                dq += dq_
                dkv[0, :, :start] += dk_
                dkv[1, :, :start] += dv_
            return dq.to(q.dtype)

        dqs = [step_back(rows, start) for rows, start in self._chunks(q.shape[1])]
        dk, dv = self._communicator.reduce_scatter(parted(dkv, 2, self._layout)).unbind()
        # Tensors of their own: outputs of a torch op must not share memory.
        return torch.cat(dqs, 1), dk.to(k.dtype), dv.to(v.dtype, copy=True)

    def _gathered(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole sequence, in its order."""
        all_k, all_v = joined(self._communicator.all_gather(torch.stack((k, v))), 2, self._layout).unbind()
        return all_k, all_v

    def _chunks(self, length: int) -> Iterator[tuple[slice, int]]:
        """Of each chunk held: its rows here, and where in the sequence it begins."""
        size = length // self._layout.chunks_per_rank
        for place, number in enumerate(self._layout.chunks(self._communicator.rank)):
            yield slice(place * size, (place + 1) * size), number * size
