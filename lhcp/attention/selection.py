"""Selection: which pyramid entries join the dense sub-sequence, stratum by stratum and without communication.

Strata are cut by global position and a chunk is a whole number of them, so the selection of given scores is
the same at every context-parallel degree. It looks at whole strata: outputs are causal given the selection,
not through it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lhcp.attention.pyramid import PyramidShape
from lhcp.attention.scoring import dilated_scores, norm_scores
from lhcp.config import ConfigError, LighthouseConfig
from lhcp.distributed import ContextParallel, check_shapes
from lhcp.kernels.lighthouse import reference


@dataclass(frozen=True)
class Selection:
    """The gathered entries of the chunks that a rank holds.

    Attributes:
        entries: int32 [B, G, S held], flat pyramid indices of the whole sequence, ordered by (end, level).
        config: the resolved configuration that made it.
        seq_len: N, tokens of the whole sequence.
        chunks: the chunks that are held, ascending.
        num_chunks: chunks of the whole sequence.
    """

    entries: Tensor
    config: LighthouseConfig
    seq_len: int
    chunks: tuple[int, ...] = (0,)
    num_chunks: int = 1

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
        return replace(self, entries=entries, chunks=chunks, num_chunks=cp.layout.num_chunks)

    @property
    def pyramid(self) -> PyramidShape:
        """The pyramid over the tokens that are held, level by level."""
        length = self.seq_len // self.num_chunks * len(self.chunks)
        return PyramidShape(length, self.config.num_levels, self.config.pooling_factor)

    @cached_property
    def rows(self) -> Tensor:
        """`entries` as rows of `pyramid`: int64 [B, G, S held]."""
        config = self.config
        level, index = PyramidShape(self.seq_len, config.num_levels, config.pooling_factor).unflatten(self.entries)
        per_chunk = torch.tensor([size // len(self.chunks) for size in self.pyramid.sizes], device=level.device)
        place = torch.full((self.num_chunks,), -1, device=level.device)
        place[list(self.chunks)] = torch.arange(len(self.chunks), device=level.device)
        chunk = index // per_chunk[level]
        return self.pyramid.flatten(level, index + (place[chunk] - chunk) * per_chunk[level])

    @cached_property
    def inverse(self) -> Tensor:
        """The slot of each row of `pyramid`, or -1: int64 [B, G, rows held]."""
        rows = self.rows
        slots = torch.arange(rows.shape[-1], device=rows.device).expand_as(rows)
        unselected = rows.new_full((*rows.shape[:2], self.pyramid.offsets[-1]), -1)
        return unselected.scatter_(-1, rows, slots)


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

    Raises:
        ConfigError: a constraint of `LighthouseConfig.resolve`, naming valid values.
        FloatingPointError: `cfg.check_finite`, and a score is not finite.
    """
    cp = context_parallel or ContextParallel()
    q = q if score_q is None else score_q
    k = k if score_k is None else score_k
    check_shapes(q, k, v if v is not None and cfg.scorer == "dilated" else k)
    if cfg.scorer == "norm":
        scores = norm_scores(q, k)
    elif v is None:
        raise ConfigError("scorer 'dilated' needs v: call select(q, k, cfg, v=v)")
    else:
        cfg = cfg.resolve(q.shape[1] * cp.size, cp.layout.num_chunks)
        scores = dilated_scores(q, k, v, cfg.dilation, cp)
    return select_from_scores(*scores, cfg, context_parallel=cp)


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
    if cfg.check_finite and not (query.isfinite().all() and key.isfinite().all()):
        raise FloatingPointError("a selection score is not finite: the model's activations have diverged")

    stratum_len = seq_len // cfg.strata
    strata = torch.cat([torch.arange(a, b, device=query_scores.device) for a, b in cp.layout.runs(cp.rank, cfg.strata)])
    level, index = reference.select_entries(
        reference.score_bits(query).unflatten(-1, (-1, stratum_len)),
        reference.score_bits(key).unflatten(-1, (-1, stratum_len)),
        cfg.num_levels,
        cfg.pooling_factor,
        cfg.topk // cfg.strata,
        (strata == 0) & cfg.cover_prefix,
    )
    index = index + strata.view(-1, 1) * (stratum_len // cfg.pooling_factor**level)
    pyramid = PyramidShape(seq_len, cfg.num_levels, cfg.pooling_factor)
    entries = pyramid.flatten(level, index).flatten(2).to(torch.int32)
    return Selection(entries, cfg, seq_len, cp.chunks, cp.layout.num_chunks)
