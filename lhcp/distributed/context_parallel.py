"""`ContextParallel`: one rank's view of sequences that several ranks share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar, overload

import torch
from torch import Tensor

from lhcp.config import BlockBackendName, ConfigError, ExchangeName, Sharding
from lhcp.distributed.communicator import Communicator, GroupCommunicator
from lhcp.distributed.exchange import make_attend
from lhcp.distributed.exchange.ops import register
from lhcp.distributed.halo import Halo
from lhcp.distributed.order import joined
from lhcp.distributed.sharding import ChunkLayout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shardable(Protocol):
    """Something other than a tensor that knows how to be sharded (a Selection)."""

    def shard(self, cp: ContextParallel) -> Self:
        """This rank's part."""

    def unshard(self, cp: ContextParallel) -> Self:
        """The whole, from every rank's part."""


S = TypeVar("S", bound=Shardable)


def check_shapes(q_BNHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor) -> None:
    """Refuse tensors that are not the q, k and v of one attention.

    Raises:
        ConfigError: naming their shapes and dtypes.
    """
    q, k, v = q_BNHD, k_BNGD, v_BNGD
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and k.shape[:2] == q.shape[:2] and k.shape[3] == q.shape[3]
    if not fits or k.shape[2] == 0 or q.shape[2] % k.shape[2] or not q.dtype == k.dtype == v.dtype:
        given = ", ".join(f"{name} {x.dtype} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ConfigError(f"{given}: k and v must be [B, N, G, D] for q [B, N, H, D], G dividing H, in one dtype")


class ContextParallel:
    """Sequences shared by the ranks of a process group.

    Args:
        group: the context-parallel ranks, or None for a degree of 1.
        sharding: `zigzag` or `contiguous` (see `sharding`).
        exchange: how shards meet in attention.
        block_backend: kernel of one attention block; `auto` picks by device.
        communicator: how the ranks reach each other, where they are not the processes of `group`.

    Raises:
        ConfigError: an unknown sharding, exchange or block backend; a package that an exchange needs is missing.
    """

    def __init__(
        self,
        group: ProcessGroup | None = None,
        sharding: Sharding = "zigzag",
        exchange: ExchangeName = "ring",
        block_backend: BlockBackendName = "auto",
        *,
        communicator: Communicator | None = None,
    ) -> None:
        if sharding not in ("zigzag", "contiguous"):
            raise ConfigError(f"sharding {sharding!r}: valid are 'zigzag', 'contiguous'")
        if communicator is None and group is not None:
            communicator = GroupCommunicator(group)
        self.group = group
        self.size = 1 if communicator is None else communicator.size
        self.rank = 0 if communicator is None else communicator.rank
        self.layout = ChunkLayout(self.size, sharding)
        self.exchange = exchange
        self.name = register(self)
        self._communicator = communicator
        self._halo = Halo(self.layout, communicator) if communicator is not None and self.size > 1 else None
        self._attend = make_attend(exchange, communicator, group, self.layout, block_backend)

    @property
    def chunks(self) -> tuple[int, ...]:
        """The chunks that this rank holds, ascending."""
        return self.layout.chunks(self.rank)

    def positions(self, seq_len: int, device: torch.device | str | None = None) -> Tensor:
        """Global position of each of this rank's tokens: int64 [N / W]."""
        return torch.cat(
            [torch.arange(start, stop, device=device) for start, stop in self.layout.runs(self.rank, seq_len)]
        )

    @overload
    def shard(self, x: Tensor, dim: int = 1) -> Tensor: ...
    @overload
    def shard(self, x: S, dim: int = 1) -> S: ...
    def shard(self, x: Tensor | S, dim: int = 1) -> Tensor | S:
        """This rank's part of `x`, which every rank holds whole; `dim` is the sequence.

        `shard` and `unshard` are inverse to each other, gradients included: the gradient of a tensor that every
        rank holds whole is held whole by every rank (collective in backward).

        Raises:
            ConfigError: the length does not divide into the chunks.
        """
        if not isinstance(x, Tensor):
            return x.shard(self)
        if self.size == 1:
            return x
        self.layout.chunk_length(x.shape[dim])
        out: Tensor = _Shard.apply(x, dim, self)  # type: ignore[no-untyped-call]
        return out

    @overload
    def unshard(self, x: Tensor, dim: int = 1) -> Tensor: ...
    @overload
    def unshard(self, x: S, dim: int = 1) -> S: ...
    def unshard(self, x: Tensor | S, dim: int = 1) -> Tensor | S:
        """The whole of `x` on every rank, from every rank's part (collective). See `shard` for gradients."""
        if not isinstance(x, Tensor):
            return x.unshard(self)
        if self.size == 1:
            return x
        if x.shape[dim] % self.layout.chunks_per_rank:
            raise ConfigError(f"a {self.layout.sharding} shard of {x.shape[dim]} is not two equal chunks")
        out: Tensor = _Unshard.apply(x, dim, self)  # type: ignore[no-untyped-call]
        return out

    def attend(self, q_BNHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor) -> Tensor:
        """Dense causal attention of the whole sequences, over shards of q, k and v (collective).

        Args:
            q_BNHD: this rank's queries, [B, N / W, H, D].
            k_BNGD: this rank's keys, with G dividing H.
            v_BNGD: likewise.

        Returns:
            [B, N / W, H, D]; differentiable.

        Raises:
            ConfigError: shapes that are not shards of one causal attention.
        """
        if q_BNHD.shape[1] % self.layout.chunks_per_rank:
            raise ConfigError(f"a {self.layout.sharding} shard of {q_BNHD.shape[1]} tokens is not two equal chunks")
        check_shapes(q_BNHD, k_BNGD, v_BNGD)
        return self._attend(q_BNHD, k_BNGD, v_BNGD)

    def without_padding(self, x: Tensor, valid_len: int) -> Tensor:
        """This rank's shard `x` [B, N / W, ...], zero from position `valid_len` of the sequence on.

        Raises:
            ConfigError: `valid_len` is not between 1 and N.
        """
        seq_len = x.shape[1] * self.size
        if not 1 <= valid_len <= seq_len:
            raise ConfigError(f"valid_len {valid_len}: must be 1 to {seq_len}, tokens of the whole sequence")
        if all(stop <= valid_len for _, stop in self.layout.runs(self.rank, seq_len)):
            return x
        padding = self.positions(seq_len, x.device) >= valid_len
        return x.masked_fill(padding.view(-1, *(1 for _ in x.shape[2:])), 0)

    def halo(self, rows: Tensor) -> Tensor:
        """For each of this rank's chunks, the `rows` of the chunk before it; zeros before the first (collective).

        Args:
            rows: [chunks of this rank, ...], what each of its chunks hands on.

        Returns:
            The same shape and dtype; differentiable.
        """
        return torch.zeros_like(rows) if self._halo is None else self._halo(rows)

    def all_shards(self, x: Tensor) -> Tensor:
        """Every rank's `x`, by rank: [W, ...] (collective)."""
        return x.unsqueeze(0) if self._communicator is None else self._communicator.all_gather(x)


def _take_shard(x: Tensor, dim: int, cp: ContextParallel) -> Tensor:
    runs = cp.layout.runs(cp.rank, x.shape[dim])
    return torch.cat([x.narrow(dim, start, stop - start) for start, stop in runs], dim)


def _gather_shards(x: Tensor, dim: int, cp: ContextParallel) -> Tensor:
    return joined(cp.all_shards(x), dim, cp.layout)


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, cp: ContextParallel) -> Tensor:
        ctx.dim, ctx.cp = dim, cp
        return _take_shard(x, dim, cp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather_shards(grad, ctx.dim, ctx.cp), None, None


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, cp: ContextParallel) -> Tensor:
        ctx.dim, ctx.cp = dim, cp
        return _gather_shards(x, dim, cp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _take_shard(grad, ctx.dim, ctx.cp), None, None
