"""Inputs of layers that wait for backward in pinned host memory, copied both ways beside the compute.

In forward, layer i's input leaves while layer i computes, and its GPU memory is free when layer i + 1 begins. In
backward it returns while layer i + 1 runs. Both on one stream of its own, so a host buffer, which is used again every
step, is never overwritten before it has been read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Forward = Callable[..., Tensor]


class InputOffload:
    """The inputs of the first `num_layers` layers of a model on `device`; on a CPU they are copied, to no use."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._num_layers = num_layers
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._host: dict[int, Tensor] = {}
        self._latest: dict[int, _Away] = {}
        self._leaving: tuple[int, Tensor, Any] | None = None
        self._returning: dict[int, tuple[Tensor, Any]] = {}

    def around(self, layer: int, forward: Forward) -> Forward:
        """The forward pass of layer `layer`, its first argument the input; for layers up to `num_layers` inclusive."""

        def run(x: Tensor, *args: Any) -> Tensor:
            if not (torch.is_grad_enabled() and x.requires_grad):
                return forward(x, *args)
            self._let_go()
            if layer == self._num_layers:
                out = forward(x, *args)
            else:
                self._send(layer, x)
                self._latest[layer] = away = _Away(layer, x)
                with saved_tensors_hooks(away.pack, self._unpack):
                    out = forward(x, *args)
                away.leave()
            if layer > 0:
                out.register_hook(lambda _: self._fetch(layer - 1))
            return out

        return run

    def _send(self, layer: int, x: Tensor) -> None:
        if layer not in self._host or not _alike(self._host[layer], x):
            self._host.pop(layer, None)
            self._host[layer] = _host_memory(x)
        self._returning.pop(layer, None)  # of a backward that did not come to its end
        x = x.detach()
        self._leaving = layer, x, self._copy(self._host[layer], x)

    def _let_go(self) -> None:
        """Hold no longer what has left: the compute stream goes on, and may write there, when it has."""
        if self._leaving is not None:
            self._wait(self._leaving[2])
            self._leaving = None

    def _fetch(self, layer: int) -> None:
        host = self._host[layer]
        x = torch.empty_like(host, device=self._side.device if self._side else "cpu", pin_memory=False)
        self._returning[layer] = x, self._copy(x, host)

    def _unpack(self, saved: Tensor | _Away) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        assert self._latest[saved.layer] is saved, "a later forward pass has taken the place of this one's inputs"
        if self._leaving is not None and self._leaving[0] == saved.layer:  # the last layer of all: still here
            x = self._leaving[1]
            self._let_go()
            return x
        if saved.layer not in self._returning:  # nobody asked beforehand
            self._fetch(saved.layer)
        x, copied = self._returning.pop(saved.layer)
        self._wait(copied)
        return x

    def _copy(self, target: Tensor, source: Tensor) -> Any:
        """Copy after all that the compute stream was given before; what to `_wait` for."""
        if self._side is None:
            target.copy_(source)
            return None
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)
            return self._side.record_event()

    def _wait(self, copied: Any) -> None:
        if copied is not None:
            torch.cuda.current_stream().wait_event(copied)


class _Away:
    """In place of a saved tensor: the layer whose input it is."""

    def __init__(self, layer: int, x: Tensor) -> None:
        self.layer = layer
        self._x: Tensor | None = x
        self._taken = False

    def pack(self, saved: Tensor) -> Tensor | _Away:
        """Itself in place of the input, anything else as it is."""
        if self._x is None or not _same(saved, self._x):
            return saved
        self._taken = True
        return self

    def leave(self) -> None:
        """The layer has run: hold its input no longer, as autograd does hold the hooks."""
        assert self._taken, "the layer does not keep its input for backward"
        self._x = None


def _same(saved: Tensor, x: Tensor) -> bool:
    """Whether a saved tensor is the input, maybe as another Python object."""
    return saved.data_ptr() == x.data_ptr() and _alike(saved, x)


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def _host_memory(x: Tensor) -> Tensor:
    """Host memory for a tensor like `x`, pinned if that is on a GPU.

    Not by `pin_memory=True`, whose allocator rounds up to a power of two.
    """
    host = torch.empty_like(x, device="cpu", requires_grad=False)
    if x.is_cuda:
        cudart = torch.cuda.cudart()
        torch.cuda.check_error(cudart.cudaHostRegister(host.data_ptr(), host.nbytes, 0))
        weakref.finalize(host, cudart.cudaHostUnregister, host.data_ptr())
    return host
