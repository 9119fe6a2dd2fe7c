"""Lighthouse attention in its six steps (arXiv:2605.06554).

Training only: a query's output depends on which entries the whole stratum selected, later tokens included, so
there is no token-by-token decoding; a run ends in dense attention. Documents in a sequence see each other.
"""

from __future__ import annotations

from torch import Tensor

from lhcp.attention.selection import Selection, select, select_from_bits
from lhcp.config import ConfigError, LighthouseConfig
from lhcp.distributed import ContextParallel, check_shapes
from lhcp.kernels.lighthouse import PyramidShape, kernels_for, reference


def lighthouse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cfg: LighthouseConfig,
    *,
    selection: Selection | None = None,
    context_parallel: ContextParallel | None = None,
    valid_len: int | None = None,
) -> Tensor:
    """Causal attention over the pooled, selected, gathered sub-sequence, scattered back to every position.

    Args:
        q: [B, N / W, H, D], this rank's queries (after RoPE).
        k: [B, N / W, G, D], G dividing H.
        v: likewise.
        cfg: the configuration; its constraints are those of `LighthouseConfig.resolve`.
        selection: entries to use instead of selecting.
        context_parallel: the ranks that share the sequence (collective); None: this process has all of it.
        valid_len: tokens of the whole sequence; those from there on are padding (see `LighthouseConfig.padded_length`),
            which is never chosen before a token, and changes nothing for tokens. None: there is none.

    Returns:
        [B, N / W, H, D] in q's dtype; without meaning where there is padding. Gradients reach q, k and v, none through
        the selection.

    Raises:
        ConfigError: a broken constraint, or a selection of another sequence or rank.
    """
    cp = context_parallel or ContextParallel()
    check_shapes(q, k, v)
    seq_len, chunks = q.shape[1] * cp.size, len(cp.chunks)
    if valid_len is not None:  # a row of zeros scores lowest
        q, k, v = (cp.without_padding(x, valid_len) for x in (q, k, v))
    kernels = kernels_for(q)
    if selection is None:
        cfg = cfg.resolve(seq_len, cp.layout.num_chunks)
    else:
        _check(selection, q, k, cfg, cp)
    shape = PyramidShape(q.shape[1], cfg.num_levels, cfg.pooling_factor)

    # 1-2. Pool, and score in the same pass over q and k.
    pooled, bits = kernels.pool(q, k, v, shape, scores=selection is None and cfg.scorer == "norm")

    # 3-4. Select, in order of (end, level).
    if selection is None:
        if bits is None:
            selection = select(q, k, cfg, v=v, context_parallel=cp, valid_len=valid_len)
        else:
            selection = select_from_bits(bits, cfg, seq_len, cp, kernels)
    rows, inverse = selection.index()

    # 5. Gather the entries of every pyramid and attend.
    out_sub = cp.attend(*kernels.gather((q, k, v), pooled, rows, inverse, shape))

    # 6. Scatter back: each position takes its entries' rows. What a chunk's last entries write past its end
    # reaches the next chunk through the halo.
    halo = cp.halo(reference.last_rows(out_sub, inverse, shape, chunks)) if cp.size > 1 else None
    return kernels.scatter_back(out_sub, rows, inverse, shape, chunks, halo)


def _check(sel: Selection, q: Tensor, k: Tensor, cfg: LighthouseConfig, cp: ContextParallel) -> None:
    """Refuse a selection that was made for something else."""
    sel.check_held_by(cp)
    if (sel.config.num_levels, sel.config.pooling_factor) != (cfg.num_levels, cfg.pooling_factor):
        raise ConfigError("the selection was made with another num_levels or pooling_factor than cfg's")
    made_for = (sel.rows.shape[0], sel.seq_len, sel.rows.shape[1])
    given = (q.shape[0], q.shape[1] * cp.size, k.shape[2])
    if made_for != given:
        raise ConfigError(f"the selection was made for (batch, seq_len, KV heads) {made_for}, not {given}")
