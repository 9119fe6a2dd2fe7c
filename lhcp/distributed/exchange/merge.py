"""Blocks of one row's attention become one, by their log-sum-exps, and so do the gradients of blocks, by addition.

Parts are held until there are `AT_ONCE`, which a GPU then reads in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AT_ONCE = 5
"""Parts held at most, but for another that is about to be added. Over four ranks a gradient has no more."""
ALL = slice(None)


@dataclass(frozen=True)
class Part:
    """Some rows and heads of a tensor [B, N, H, D].

    Attributes:
        x: [B, n, h, D] in any dtype, D contiguous.
        row: of the tensor, where `x` begins.
        head: likewise.
        lse: of attention's output, with all its heads, the log-sum-exp [B, H, n]; finite.
    """

    x: Tensor
    row: int = 0
    head: int = 0
    lse: Tensor | None = None

    @property
    def rows(self) -> slice:
        """Of the tensor."""
        return slice(self.row, self.row + self.x.shape[1])

    @property
    def heads(self) -> slice:
        """Of the tensor."""
        return slice(self.head, self.head + self.x.shape[2])


class Sum:
    """A tensor like another, as the sum of its parts: in the accumulation dtype, rounded once."""

    def __init__(self, like: Tensor) -> None:
        self._like, self._accumulated = like, torch.promote_types(like.dtype, torch.float32)
        self._parts: list[Part] = []
        self._so_far: Tensor | None = None
        """The first of the parts, once there were too many."""

    def add(self, x: Tensor, rows: slice = ALL, heads: slice = ALL) -> None:
        """Add a part, which may not change from now on.

        Args:
            x: [B, n, h, D] in any dtype, D contiguous.
            rows: of the tensor, which `x` is of.
            heads: likewise.
        """
        if len(self._parts) == AT_ONCE:
            if self._so_far is None:
                self._so_far = self._like.new_empty(self._like.shape, dtype=self._accumulated)
            add(self._so_far, self._parts)
            self._parts = [Part(self._so_far)]
        self._parts.append(Part(x, rows.start or 0, heads.start or 0))

    def result(self) -> Tensor:
        """All that was added, zeros where nothing was."""
        out = self._like.new_empty(self._like.shape)
        add(out, self._parts)
        return out


class Merge:
    """Attention's output and log-sum-exp from those of blocks, of which the first has all rows."""

    def __init__(self, like: Tensor) -> None:
        self._like, self._accumulated = like, torch.promote_types(like.dtype, torch.float32)
        self._parts: list[Part] = []
        self._so_far: Tensor | None = None
        """As a `Sum`'s."""

    def add(self, out: Tensor, lse: Tensor, rows: slice = ALL) -> None:
        """Fold a block in; what is given may not change from now on.

        Args:
            out: [B, n, H, D] in any dtype, D contiguous.
            lse: [B, H, n] in the accumulation dtype, finite.
            rows: that the block has.
        """
        if len(self._parts) == AT_ONCE:
            if self._so_far is None:
                self._so_far = self._like.new_empty(self._like.shape, dtype=self._accumulated)
            self._parts = [Part(self._so_far, lse=self._merged(self._so_far))]
        self._parts.append(Part(out, rows.start or 0, lse=lse))

    def result(self) -> tuple[Tensor, Tensor]:
        """[B, N, H, D] in the dtype of what it is like, rounded once, and [B, H, N] in the accumulation dtype."""
        out = self._like.new_empty(self._like.shape)
        return out, self._merged(out)

    def _merged(self, out: Tensor) -> Tensor:
        """Put the output into `out`; the log-sum-exp, in a tensor of its own."""
        batch, n, heads, _ = out.shape
        lse = out.new_empty((batch, heads, n), dtype=self._accumulated)
        merge(out, lse, self._parts)
        return lse


def add(out: Tensor, parts: Sequence[Part]) -> None:
    """Put the sum of some parts into `out`, contiguous, in which the first may be."""
    accumulated = torch.promote_types(out.dtype, torch.float32)
    if out.is_cuda and accumulated == torch.float32:
        from lhcp.distributed.exchange.merge_kernel import add_in_one_pass

        add_in_one_pass(out, parts)
        return
    total = out if out.dtype == accumulated else torch.empty_like(out, dtype=accumulated)
    if total is out and parts and parts[0].x is out:
        parts = parts[1:]
    else:
        total.zero_()
    for part in parts:
        total[:, part.rows, part.heads] += part.x
    if total is not out:
        out.copy_(total)


def merge(out: Tensor, lse: Tensor, parts: Sequence[Part]) -> None:
    """Put some blocks, the first of all rows, into `out` and `lse`, contiguous. The first's output may be in `out`."""
    accumulated = torch.promote_types(out.dtype, torch.float32)
    if out.is_cuda and accumulated == torch.float32:
        from lhcp.distributed.exchange.merge_kernel import merge_in_one_pass

        merge_in_one_pass(out, lse, parts)
        return
    first, *others = parts
    assert first.lse is not None
    total = first.x.to(accumulated, copy=True)
    lse.copy_(first.lse)
    for part in others:
        assert part.lse is not None
        before = lse[..., part.rows]
        after = torch.logaddexp(before, part.lse)
        total[:, part.rows] *= (before - after).exp().transpose(1, 2).unsqueeze(-1)
        total[:, part.rows] += part.x * (part.lse - after).exp().transpose(1, 2).unsqueeze(-1)
        before.copy_(after)
    out.copy_(total)
