"""What one GPU has of a run, in plain numbers.

Names: n tokens of a micro-batch on a rank, r rows of the sub-sequence on it, E width of the model, HD and GD of all
query and all KV heads, F of the feed-forward, V words, b bytes of an activation.
"""

from __future__ import annotations

from dataclasses import dataclass

from lhcp.config import ConfigError, ExchangeName, LighthouseConfig, MemoryConfig, RunConfig, StageMode

ITEMSIZE = 2
"""b, bytes of an element of activations and of gathered parameters: bfloat16."""


@dataclass(frozen=True)
class Share:
    """One GPU's share of a run. Sizes are of one micro-batch."""

    ranks: int
    """R = dp x cp: GPUs."""
    gpus_per_node: int
    cp: int
    """W."""
    chunks_per_rank: int
    exchange: ExchangeName
    balanced: bool
    """Whether all ranks have as many causal pairs."""
    passes: int
    """Micro-batches of one optimizer step."""
    sequences: int
    """Of a micro-batch."""
    length: int
    """Tokens of a padded sequence, over all ranks of its group."""
    attention: LighthouseConfig | None
    """Resolved; None: no stage uses it."""
    layers: int
    width: int
    """E."""
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """F."""
    vocabulary: int
    """V."""
    tied: bool

    @property
    def tokens(self) -> int:
        """n."""
        return self.sequences * self.length // self.cp

    @property
    def q(self) -> int:
        """HD, elements of a token's query heads."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """2 GD, elements of a token's keys and values."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def block_parameters(self) -> int:
        """Of one layer: projections, feed-forward, two norms."""
        return self.width * (2 * self.q + self.kv + 3 * self.ffn + 2)

    @property
    def root_parameters(self) -> int:
        """Of embedding, output head and last norm."""
        return self.width * (self.vocabulary * (1 if self.tied else 2) + 1)

    @property
    def parameters(self) -> int:
        """P, of the whole model."""
        return self.layers * self.block_parameters + self.root_parameters

    def attended(self, kind: StageMode) -> int:
        """Rows of a sequence that meet in attention, over all ranks: N, or S in a Lighthouse layer."""
        if kind == "dense":
            return self.length
        assert self.attention is not None
        return self.attention.subsequence_length(self.length)

    def rows(self, kind: StageMode) -> int:
        """Of a micro-batch on this rank, that meet in attention: n or r."""
        return self.sequences * self.attended(kind) // self.cp


def share_of(run: RunConfig, gpus: int, gpus_per_node: int) -> Share:
    """Of a resolved run.

    Raises:
        ConfigError: GPUs that do not fill nodes.
    """
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise ConfigError(f"--gpus {gpus} is not a multiple of --gpus-per-node {gpus_per_node}")
    parallel, model = run.parallel, run.model
    assert parallel.dp is not None
    return Share(
        ranks=gpus,
        gpus_per_node=gpus_per_node,
        cp=parallel.cp,
        chunks_per_rank=parallel.num_chunks // parallel.cp,
        exchange=parallel.exchange,
        balanced=parallel.cp == 1 or parallel.sharding == "zigzag" or parallel.exchange == "ulysses",
        passes=run.global_batch_size // (parallel.dp * run.micro_batch_size),
        sequences=run.micro_batch_size,
        length=run.padded_len,
        attention=run.attention if any(stage.mode == "lighthouse" for stage in run.stages) else None,
        layers=model.num_layers,
        width=model.dim,
        heads=model.num_heads,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        ffn=model.ffn_dim,
        vocabulary=model.vocab_size,
        tied=model.tie_embeddings,
    )


@dataclass(frozen=True)
class Layer:
    """What decides the memory and time of one layer."""

    kind: StageMode
    recompute: str
    """`none`, `selective` or `full`, of this layer."""
    offloaded: bool
    """Whether its input waits in host memory."""


def layers_of(run: RunConfig, memory: MemoryConfig, mode: StageMode) -> list[Layer]:
    """The layers of a stage under given memory settings, in order."""
    total, dense = run.model.num_layers, set(run.dense_layers)
    wanted = total if memory.recompute_layers is None else memory.recompute_layers
    recomputed = 0 if memory.recompute == "none" else wanted
    return [
        Layer(
            kind="dense" if i in dense else mode,
            recompute=memory.recompute if i < recomputed else "none",
            offloaded=i < memory.offload_layers,
        )
        for i in range(total)
    ]
