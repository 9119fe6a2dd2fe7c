"""The configuration of a run: every key, its default and its constraint. Imports no torch.

A run is described by one YAML file (see `launch/configs/`). Wrong values end in one `ConfigError` whose
message names the key, what was given and what is valid; reading files is in `lhcp.config_file`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(strict=True, ge=1)]
Sharding = Literal["zigzag", "contiguous"]
ExchangeName = Literal["ring"]
BlockBackendName = Literal["auto", "math", "cpu", "cudnn", "flash"]
StageMode = Literal["lighthouse", "dense"]
RecomputeMode = Literal["none", "selective", "full"]
EvalMode = Literal["dense", "lighthouse", "no_attention"]


class ConfigError(ValueError):
    """A value the user can correct; the message says which and how."""


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LighthouseConfig(Section):
    """Lighthouse attention (arXiv:2605.06554). These values are part of what the model computes."""

    num_levels: Annotated[int, Field(strict=True, ge=2, le=12)] = 3
    """Pyramid levels L; level 0 are the tokens."""
    pooling_factor: Annotated[int, Field(strict=True, ge=2)] = 4
    """p: an entry of level l covers p^l tokens."""
    topk: Annotated[int, Field(strict=True, ge=2)] = 1536
    """Selection budget per level and KV head, over the whole sequence."""
    num_strata: PositiveInt | None = None
    """Equal runs of tokens that select on their own. None: derived by `resolve`, once, when a run is created."""
    max_cp: PositiveInt = 8
    """The largest context-parallel degree that a derived `num_strata` must allow."""
    scorer: Literal["norm", "dilated"] = "norm"
    """`norm`: L2 norm of the rows of Q and K; `dilated`: of the outputs of attention over every delta-th token."""
    dilation: PositiveInt = 4
    """delta of the `dilated` scorer; divides a chunk."""
    cover_prefix: bool = True
    """Always select the first entry of each level, so that every position receives at least one row."""
    check_finite: bool = False
    """Raise FloatingPointError when a score is not finite (costs a device synchronisation per layer)."""

    @property
    def coarsest_window(self) -> int:
        """Tokens under one entry of the coarsest level, p^(L-1)."""
        return int(self.pooling_factor ** (self.num_levels - 1))

    def resolve(self, seq_len: int, num_chunks: int = 1) -> LighthouseConfig:
        """Check every constraint for sequences of `seq_len` tokens and fix `num_strata`.

        Args:
            seq_len: N, tokens of one sequence over all context-parallel ranks.
            num_chunks: runs of tokens that the sequence is split into (1, W, or 2W under zigzag).

        Raises:
            ConfigError: naming the constraint that fails and valid values.
        """
        if seq_len % (self.coarsest_window * num_chunks):
            raise ConfigError(
                f"seq_len {seq_len} is not a multiple of pooling_factor^(num_levels-1) = {self.coarsest_window} tokens "
                f"in each of {num_chunks} chunk(s); nearest legal: "
                f"{_nearest_multiples(seq_len, self.coarsest_window * num_chunks)}"
            )
        if self.topk > seq_len // self.coarsest_window:
            raise ConfigError(
                f"topk {self.topk} exceeds the {seq_len // self.coarsest_window} coarsest entries of seq_len {seq_len} "
                f"(num_levels {self.num_levels}, pooling_factor {self.pooling_factor}); it must be at most that"
            )
        legal = legal_num_strata(self, seq_len)
        fitting = [s for s in legal if s % num_chunks == 0]
        advice = f"valid: {fitting}" if fitting else "none is valid here: topk should be a multiple of the chunks"
        strata = self.num_strata
        if strata is None:
            # Whatever num_chunks is: the same run at another context-parallel degree must select the same.
            step = 2 * self.max_cp
            strata = next((s for s in legal if s % step == 0 and s * 128 >= self.topk), None)
            if strata is None:
                raise ConfigError(
                    f"num_strata is unset, and no multiple of 2 x max_cp = {step} is legal for seq_len {seq_len} and "
                    f"topk {self.topk}; {advice}"
                )
        if strata not in fitting:
            raise ConfigError(
                f"num_strata {strata} is not legal: {self._broken_by(strata, seq_len, num_chunks)}; {advice}"
            )
        if self.scorer == "dilated" and seq_len // num_chunks % self.dilation:
            raise ConfigError(f"dilation {self.dilation} does not divide the chunk of {seq_len // num_chunks} tokens")
        return self.model_copy(update={"num_strata": strata})

    @property
    def strata(self) -> int:
        """`num_strata` of a resolved configuration."""
        assert self.num_strata is not None, "call resolve(seq_len) first"
        return self.num_strata

    def subsequence_length(self, seq_len: int) -> int:
        """S, the gathered entries of one sequence: N / p^(L-1) + (L-1) p topk."""
        return seq_len // self.coarsest_window + (self.num_levels - 1) * self.pooling_factor * self.topk

    def _broken_by(self, strata: int, seq_len: int, num_chunks: int) -> str:
        """The first constraint that `strata` breaks, in words."""
        coarsest = seq_len // self.coarsest_window
        if self.topk % strata:
            return f"it does not divide topk {self.topk}"
        if seq_len % strata:
            return f"it does not divide seq_len {seq_len}"
        if coarsest % strata:
            return f"a stratum of {seq_len // strata} tokens is not a multiple of {self.coarsest_window}"
        if strata % num_chunks:
            return (
                f"it does not divide evenly over the {num_chunks} chunks of the context-parallel layout (a chunk is a "
                f"whole number of strata)"
            )
        return f"it leaves a budget of {self.topk // strata} entry per stratum, fewer than 2"


def legal_num_strata(config: LighthouseConfig, seq_len: int) -> list[int]:
    """Every legal `num_strata` for N = `seq_len`, ascending: divides topk and N, whole coarsest windows, 2 <= m."""
    coarsest = seq_len // config.coarsest_window
    if seq_len % config.coarsest_window or config.topk > coarsest:
        return []
    return [s for s in range(1, config.topk // 2 + 1) if config.topk % s == 0 and coarsest % s == 0]


def _nearest_multiples(value: int, step: int) -> str:
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)


class LinearRopeScaling(Section):
    """Positions divided by `factor` (arXiv:2306.15595)."""

    type: Literal["linear"] = "linear"
    factor: Annotated[float, Field(ge=1)]


class Llama3RopeScaling(Section):
    """Llama 3.1's: waves that are long for the original context are stretched by `factor`, short ones stay."""

    type: Literal["llama3"] = "llama3"
    factor: Annotated[float, Field(ge=1)]
    low_freq_factor: Annotated[float, Field(gt=0)]
    """Waves of more than original_max_position_embeddings / low_freq_factor tokens are stretched wholly."""
    high_freq_factor: Annotated[float, Field(gt=0)]
    """Those of less than original_max_position_embeddings / high_freq_factor stay; in between it goes over."""
    original_max_position_embeddings: PositiveInt
    """Tokens of the original context."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor:g} must be greater than low_freq_factor "
                f"{self.low_freq_factor:g}"
            )
        return self


RopeScaling = LinearRopeScaling | Llama3RopeScaling


class ModelConfig(Section):
    """A Llama-style decoder. `preset: NAME` in a file starts from a preset (see `lhcp.presets`)."""

    vocab_size: PositiveInt
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    dim: PositiveInt
    """Width of the residual stream."""
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    """Divides num_heads."""
    head_dim: Annotated[int, Field(strict=True, ge=2, multiple_of=2)]
    ffn_dim: PositiveInt
    """Hidden width of the SwiGLU feed-forward."""
    rope_theta: Annotated[float, Field(gt=1)] = 10_000.0
    rope_scaling: RopeScaling | None = Field(default=None, discriminator="type")
    """How a model was adapted to more positions; part of what it computes."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    tie_embeddings: Annotated[bool, Field(strict=True)] = False
    """The output weight is the embedding."""
    init_from: Path | None = None
    """A checkpoint folder (from `lhcp import` or of another run) whose weights a new run starts from; None: random.
    In a file it is enough alone: the other keys are the checkpoint's."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            divisors = [d for d in range(1, self.num_heads + 1) if self.num_heads % d == 0]
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}; valid: {divisors}"
            )
        return self


class DataConfig(Section):
    """Where the tokens are."""

    path: Path
    """Folder written by `lhcp data prepare`."""
    verify: Annotated[bool, Field(strict=True)] = True
    """Read every shard at the start of a run and compare checksums; the ranks share the work, a shard each in turn.
    Costs about a second for each GB of a rank's share, or what the disks take. Of copies on the nodes' own disks each
    is read in part only: there, run `lhcp data verify` on every node."""


class OptimConfig(Section):
    """AdamW and its schedule: linear warm-up, then constant."""

    lr: Annotated[float, Field(gt=0)] = 2e-3
    warmup_steps: Annotated[int, Field(strict=True, ge=0)] = 2_000
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Applied to matrices, not to norms."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest global gradient norm."""
    max_skipped_steps: Annotated[int, Field(strict=True, ge=0)] = 10
    """Steps in a row whose loss or gradient norm is not finite, which leave the weights alone; one more is the end."""


class ParallelConfig(Section):
    """How ranks share the work: `dp` replicas, each of `cp` ranks that share one sequence."""

    dp: PositiveInt | None = None
    """Data-parallel degree. None: processes / cp."""
    cp: PositiveInt = 1
    """Context-parallel degree W: ranks that hold one sequence together."""
    sharding: Sharding = "zigzag"
    """`zigzag` balances causal work; `contiguous` gives each rank one run of tokens."""
    exchange: ExchangeName = "ring"
    """How shards meet in attention when cp > 1."""
    block_backend: BlockBackendName = "auto"
    """Kernel of one attention block; `auto` picks by device."""

    @property
    def num_chunks(self) -> int:
        """Runs of tokens that a sequence is split into."""
        return 2 * self.cp if self.sharding == "zigzag" and self.cp > 1 else self.cp

    def resolve(self, world_size: int) -> ParallelConfig:
        """Fix `dp` for `world_size` processes.

        Raises:
            ConfigError: when dp x cp is not the number of processes.
        """
        dp = self.dp if self.dp is not None else world_size // self.cp
        if dp * self.cp != world_size:
            wanted = f"{self.dp * self.cp}" if self.dp is not None else f"a multiple of {self.cp}"
            raise ConfigError(
                f"parallel.dp {self.dp or 'unset'} x parallel.cp {self.cp} does not match {world_size} process(es); "
                f"start {wanted}, or set parallel.cp to a divisor of {world_size}"
            )
        return self.model_copy(update={"dp": dp})


class StageConfig(Section):
    """One stage of a run; the optimizer state and the data order go on across stages."""

    mode: StageMode
    """`lighthouse`: selection on, except in `dense_layers`; `dense`: ordinary full attention."""
    steps: PositiveInt


class MemoryConfig(Section):
    """What is kept for backward."""

    recompute: RecomputeMode = "none"
    """`selective`: the feed-forward halves of layers run again in backward; `full`: whole layers, attention too."""


class CheckpointConfig(Section):
    """What a run can be resumed from."""

    every: Annotated[int, Field(strict=True, ge=0)] = 500
    """Steps between checkpoints; 0: only at the end, and when the run is told to stop."""
    keep: PositiveInt = 3
    """Newest checkpoints that are kept."""
    stop_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds after SIGTERM or SIGUSR1 to end the step and save in; a rank that has not by then exits with 76."""


class EvalConfig(Section):
    """Held-out loss during training."""

    every: Annotated[int, Field(strict=True, ge=0)] = 0
    """Steps between evaluations; 0: only at the end."""
    sequences: Annotated[int, Field(strict=True, ge=0)] = 0
    """Held-out sequences; 0: no evaluation."""
    modes: Annotated[list[EvalMode], Field(min_length=1)] = ["dense"]
    """`dense`; `lighthouse`; `no_attention`: every attention output zeroed, to see what context is worth."""


class RunConfig(Section):
    """A whole run."""

    output_dir: Path
    """The run folder: config, metrics, plots."""
    seq_len: PositiveInt
    """N, tokens of one sequence over all context-parallel ranks."""
    global_batch_size: PositiveInt
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: PositiveInt = 1
    """Sequences per forward pass of one data-parallel replica."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 0
    """Of the initial weights and of the data order."""
    dtype: Literal["float32", "float64"] = "float32"
    """Of the weights, gradients and optimizer state."""
    compute_dtype: Literal["float32", "float64", "bfloat16"] | None = None
    """Of activations and matrix products. None: `dtype`."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: Annotated[bool, Field(strict=True)] = False
    """Only deterministic kernels: two runs of one layout give bit-identical weights. Slower on GPUs."""
    model: ModelConfig
    data: DataConfig
    stages: Annotated[list[StageConfig], Field(min_length=1)]
    attention: LighthouseConfig = LighthouseConfig()
    dense_layers: list[Annotated[int, Field(strict=True, ge=0)]] = []
    """Layers that stay dense in a Lighthouse stage."""
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def activation_dtype(self) -> str:
        """`compute_dtype`, or `dtype` where it is left out."""
        return self.compute_dtype or self.dtype

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> StageConfig:
        """The stage of optimizer step `step` (from 0)."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise AssertionError("step is beyond the last stage")

    def resolve(self, world_size: int) -> RunConfig:
        """Check what depends on several sections, and fix every derived value.

        Raises:
            ConfigError: naming the keys, and values that would do.
        """
        parallel = self.parallel.resolve(world_size)
        assert parallel.dp is not None
        per_pass = parallel.dp * self.micro_batch_size
        if self.global_batch_size % per_pass:
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} is not a multiple of dp {parallel.dp} x "
                f"micro_batch_size {self.micro_batch_size}; nearest legal: "
                f"{_nearest_multiples(self.global_batch_size, per_pass)}"
            )
        attention = self.attention
        if "lighthouse" in {*self.eval.modes, *(stage.mode for stage in self.stages)}:
            attention = attention.resolve(self.seq_len, parallel.num_chunks)
        if self.seq_len % parallel.num_chunks:
            raise ConfigError(
                f"seq_len {self.seq_len} is not a multiple of the {parallel.num_chunks} chunks of parallel.cp "
                f"{parallel.cp} ({parallel.sharding}); nearest legal: "
                f"{_nearest_multiples(self.seq_len, parallel.num_chunks)}"
            )
        backend, device, dtype = parallel.block_backend, self.device, self.activation_dtype
        fused = backend in ("cudnn", "flash")
        if (backend == "cpu" and device == "cuda") or (fused and (device == "cpu" or dtype != "bfloat16")):
            raise ConfigError(
                f"parallel.block_backend {backend} does not take {dtype} on device {device}; use auto or math"
                + (", or set compute_dtype: bfloat16 on a GPU" if fused else "")
            )
        outside = [i for i in self.dense_layers if not 0 <= i < self.model.num_layers]
        if outside:
            raise ConfigError(f"dense_layers {outside}: the model's layers are 0 to {self.model.num_layers - 1}")
        if self.eval.sequences % parallel.dp:
            raise ConfigError(
                f"eval.sequences {self.eval.sequences} is not a multiple of dp {parallel.dp}; nearest legal: "
                f"{_nearest_multiples(self.eval.sequences, parallel.dp)}"
            )
        return self.model_copy(update={"parallel": parallel, "attention": attention})
