"""Selection: which pyramid entries join the dense sub-sequence, stratum by stratum and without communication.

Strata are cut by global position and a chunk is a whole number of them, so the selection of given scores is
the same at every context-parallel degree. It looks at whole strata: outputs are causal given the selection,
not through it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lhcp.attention.scoring import dilated_rows
from lhcp.config import ConfigError, LighthouseConfig
from lhcp.distributed import ContextParallel, check_shapes
from lhcp.kernels.lighthouse import Bits, Kernels, PyramidShape, kernels_for, reference
from lhcp.kernels.lighthouse.select_op import select_rows


@dataclass(frozen=True)
class Selection:
    """The gathered entries of the chunks that a rank holds.

    Attributes:
        rows: int32 [B, G, S held], flat indices of the pyramid over the tokens that are held, ordered by (end, level).
        config: the resolved configuration that made it.
        seq_len: N, tokens of the whole sequence.
        chunks: the chunks that are held, ascending.
        num_chunks: chunks of the whole sequence.
    """

    rows: Tensor
    config: LighthouseConfig
    seq_len: int
    chunks: tuple[int, ...] = (0,)
    num_chunks: int = 1

    @property
    def entries(self) -> Tensor:
        """As `rows`, in the pyramid of the whole sequence: int32 [B, G, S held]."""
        return self._renumbered(self.rows, to_held=False)

    def shard(self, cp: ContextParallel) -> Selection:
        """A whole sequence's selection -> this rank's slots."""
        if len(self.chunks) != self.num_chunks:
            raise ConfigError("shard: this selection is a shard already")
        self.config.resolve(self.seq_len, cp.layout.num_chunks)
        return self._held_by(cp, cp.shard(self.entries, dim=-1), cp.chunks)

    def unshard(self, cp: ContextParallel) -> Selection:
        """This rank's slots -> the whole sequence's selection, on every rank (collective)."""
        self.check_held_by(cp)
        return self._held_by(cp, cp.unshard(self.entries, dim=-1), tuple(range(cp.layout.num_chunks)))

    def check_held_by(self, cp: ContextParallel) -> None:
        """Refuse a selection of other chunks than `cp`'s rank holds.

        Raises:
            ConfigError: naming both.
        """
        expected = (cp.chunks, cp.layout.num_chunks)
        if (self.chunks, self.num_chunks) != expected and not (cp.size == 1 and len(self.chunks) == self.num_chunks):
            raise ConfigError(
                f"the selection holds chunks {self.chunks} of {self.num_chunks}, this rank {expected[0]} of "
                f"{expected[1]}; shard the whole sequence's selection with ContextParallel.shard"
            )

    def _held_by(self, cp: ContextParallel, entries: Tensor, chunks: tuple[int, ...]) -> Selection:
        held = replace(self, rows=entries, chunks=chunks, num_chunks=cp.layout.num_chunks)
        return replace(held, rows=held._renumbered(entries, to_held=True))

    @property
    def pyramid(self) -> PyramidShape:
        """The pyramid over the tokens that are held, level by level."""
        return _pyramid(self.config, self.seq_len // self.num_chunks * len(self.chunks))

    def index(self) -> tuple[Tensor, Tensor]:
        """`rows`, and the slot of each row of `pyramid`, or -1.

        Returns:
            int32 [B, G, S held] and [B, G, rows held].
        """
        rows = self.rows.to(torch.int32).contiguous()
        return rows, reference.invert(rows, self.pyramid.offsets[-1])

    def _renumbered(self, flat: Tensor, *, to_held: bool) -> Tensor:
        """Flat indices of the whole sequence's pyramid -> of the held one, or back."""
        if len(self.chunks) == self.num_chunks:
            return flat
        whole = _pyramid(self.config, self.seq_len)
        source, target = (whole, self.pyramid) if to_held else (self.pyramid, whole)
        level, index = source.unflatten(flat)
        per_chunk = self.seq_len // self.num_chunks // self.config.pooling_factor**level
        chunk = index // per_chunk
        for place, number in enumerate(self.chunks):
            before, after = (number, place) if to_held else (place, number)
            index = index + (chunk == before) * (after - before) * per_chunk
        return target.flatten(level, index).to(torch.int32)


@torch.no_grad()
def select(
    q: Tensor,
    k: Tensor,
    cfg: LighthouseConfig,
    *,
    v: Tensor | None = None,
    score_q: Tensor | None = None,
    score_k: Tensor | None = None,
    context_parallel: ContextParallel | None = None,
    valid_len: int | None = None,
) -> Selection:
    """Score and select.

    Args:
        q: [B, N / W, H, D], this rank's queries (after RoPE).
        k: [B, N / W, G, D], G dividing H.
        cfg: the configuration; resolved for N if it is not yet.
        v: [B, N / W, G, D], this rank's values; the `dilated` scorer needs them.
        score_q: rows to score instead of `q` (of a model with QK-norm: those before it).
        score_k: likewise, instead of `k`.
        context_parallel: the ranks that share the sequence.
        valid_len: tokens of the whole sequence; what follows is padding, which is chosen after any token.

    Raises:
        ConfigError: a constraint of `LighthouseConfig.resolve`, naming valid values.
        FloatingPointError: `cfg.check_finite`, and a score is not finite.
    """
    cp = context_parallel or ContextParallel()
    q = q if score_q is None else score_q
    k = k if score_k is None else score_k
    check_shapes(q, k, v if v is not None and cfg.scorer == "dilated" else k)
    seq_len = q.shape[1] * cp.size
    cfg = cfg.resolve(seq_len, cp.layout.num_chunks)
    if valid_len is not None:  # a row of zeros scores lowest, and is last among equals
        q, k = cp.without_padding(q, valid_len), cp.without_padding(k, valid_len)
    rows = (q, k)
    if cfg.scorer == "dilated":
        if v is None:
            raise ConfigError("scorer 'dilated' needs v: call select(q, k, cfg, v=v)")
        if valid_len is not None:
            v = cp.without_padding(v, valid_len)
        rows = dilated_rows(q, k, v, cfg.dilation, cp)
        if valid_len is not None:
            rows = (cp.without_padding(rows[0], valid_len), cp.without_padding(rows[1], valid_len))
    kernels, shape, groups = kernels_for(q), _pyramid(cfg, q.shape[1]), k.shape[2]
    bits = (kernels.score(rows[0], groups, shape), kernels.score(rows[1], groups, shape))
    return select_from_bits(bits, cfg, seq_len, cp, kernels)


@torch.no_grad()
def select_from_scores(
    query_scores: Tensor,
    key_scores: Tensor,
    cfg: LighthouseConfig,
    *,
    context_parallel: ContextParallel | None = None,
) -> Selection:
    """The selection of given level-0 scores, [B, G, N / W], non-negative; see `select`."""
    cp = context_parallel or ContextParallel()
    seq_len = query_scores.shape[-1] * cp.size
    cfg = cfg.resolve(seq_len, cp.layout.num_chunks)
    if query_scores.shape != key_scores.shape:
        raise ConfigError(f"query scores {tuple(query_scores.shape)} and key scores {tuple(key_scores.shape)} differ")
    query, key = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query_scores, key_scores))
    shape = _pyramid(cfg, query.shape[-1])
    bits = (reference.score_bits(query, shape), reference.score_bits(key, shape))
    return select_from_bits(bits, cfg, seq_len, cp, kernels_for(query))


@torch.no_grad()
def select_from_bits(
    bits: Bits, cfg: LighthouseConfig, seq_len: int, cp: ContextParallel, kernels: Kernels
) -> Selection:
    """The selection of given score bits (see `reference.score_bits`), for a resolved `cfg`; see `select`."""
    if cfg.check_finite:
        query_bits, key_bits = bits
        infinity = torch.tensor(torch.inf, dtype=torch.float64 if query_bits.dtype == torch.int64 else torch.float32)
        largest = torch.stack([query_bits.max(), key_bits.max()]).max()
        if int(largest) >= int(infinity.view(query_bits.dtype)):
            raise FloatingPointError("a selection score is not finite: the model's activations have diverged")
    shape = _pyramid(cfg, seq_len // cp.size)
    cover = cfg.cover_prefix and 0 in cp.chunks  # the first stratum of all is then the first held
    strata = cfg.num_strata
    assert strata is not None
    rows = select_rows(kernels, bits, shape, strata // cp.size, cfg.topk // strata, cover)
    return Selection(rows, cfg, seq_len, cp.chunks, cp.layout.num_chunks)


def _pyramid(cfg: LighthouseConfig, length: int) -> PyramidShape:
    """The pyramid over `length` tokens."""
    return PyramidShape(length, cfg.num_levels, cfg.pooling_factor)
