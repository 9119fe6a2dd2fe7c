"""A whole run, and its sections other than the model and its attention."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from lhcp.config.lighthouse import LighthouseConfig
from lhcp.config.model import ModelConfig
from lhcp.config.parallel import ParallelConfig
from lhcp.config.section import ConfigError, PositiveInt, Section, WrittenPath, nearest_multiples

StageMode = Literal["lighthouse", "dense"]
RecomputeMode = Literal["none", "selective", "full"]
EvalMode = Literal["dense", "lighthouse", "no_attention"]


class DataConfig(Section):
    """Where the tokens are."""

    path: WrittenPath
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


class StageConfig(Section):
    """One stage of a run; the optimizer state and the data order go on across stages."""

    mode: StageMode
    """`lighthouse`: selection on, except in `dense_layers`; `dense`: ordinary full attention."""
    steps: PositiveInt


class MemoryConfig(Section):
    """What is kept for backward, and where."""

    recompute: RecomputeMode = "none"
    """What runs again in backward: `selective`, layers but for their attention call, whose output is kept; `full`, the
    attention call too. A layer that runs again attends with the entries that it had selected."""
    recompute_layers: Annotated[int, Field(strict=True, ge=0)] | None = None
    """So many layers, the first ones, are recomputed; the others keep what they need. None: all."""
    offload_layers: Annotated[int, Field(strict=True, ge=0)] = 0
    """So many layers, the first ones, keep their input in pinned host memory, copied both ways beside the compute; the
    others' stays on the GPU. They must be among those that are recomputed."""


class ProfileConfig(Section):
    """What is recorded for the profiler, into `profile/` of the run folder, by rank 0."""

    steps: str | None = None
    """`FIRST:LAST`, counted from 1: a trace of these steps, and a table of the time by kernel. None: nothing."""
    memory: Annotated[bool, Field(strict=True)] = False
    """A snapshot of the GPU's memory too, every allocation of these steps with its stack."""

    @property
    def range(self) -> tuple[int, int] | None:
        """First and last step, counted from 1; None: nothing is recorded."""
        if self.steps is None:
            return None
        first, last = map(int, self.steps.split(":"))
        return first, last

    @field_validator("steps", mode="before")
    @classmethod
    def _check_steps(cls, given: object) -> object:
        match = re.fullmatch("([0-9]{1,9}):([0-9]{1,9})", str(given))
        if given is not None and (match is None or not 1 <= int(match[1]) <= int(match[2])):
            raise ValueError(f"given {given!r}, must be FIRST:LAST, counted from 1, such as 10:13")
        return given

    @model_validator(mode="after")
    def _check_memory(self) -> Self:
        if self.memory and self.steps is None:
            raise ValueError("memory needs steps, FIRST:LAST, such as 10:13")
        return self

    def check_device(self, device: str) -> None:
        """Refuse what cannot be recorded on a type of device, `auto` being any.

        Raises:
            ConfigError: saying what.
        """
        if self.memory and device == "cpu":
            raise ConfigError("profile.memory records the memory of a GPU, and the run is on CPUs; set it to false")


class CheckpointConfig(Section):
    """What a run can be resumed from."""

    every: Annotated[int, Field(strict=True, ge=0)] = 500
    """Steps between checkpoints; 0: only at the end, and when the run is told to stop."""
    keep: PositiveInt = 3
    """Newest checkpoints that are kept."""
    stop_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds after SIGTERM or SIGUSR1 to end the step and save in; a rank that has not by then exits with 76."""
    max_failures: PositiveInt = 3
    """Failures in a row, without a new checkpoint between them, after which a job does not start the run again."""


class EvalConfig(Section):
    """Held-out loss during training."""

    every: Annotated[int, Field(strict=True, ge=0)] = 0
    """Steps between evaluations; 0: only at the end."""
    sequences: Annotated[int, Field(strict=True, ge=0)] = 0
    """Held-out sequences; 0: no evaluation."""
    modes: Annotated[list[EvalMode], Field(min_length=1)] = Field(default_factory=lambda: list[EvalMode](["dense"]))
    """`dense`; `lighthouse`; `no_attention`: every attention output zeroed, to see what context is worth."""


class RunConfig(Section):
    """A whole run."""

    output_dir: WrittenPath
    """The run folder: config, metrics, plots."""
    seq_len: PositiveInt
    """N, tokens of one sequence over all context-parallel ranks. Padded where attention or the layout need it; padding
    costs time, and changes nothing else."""
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
    compile: Annotated[bool, Field(strict=True)] | None = None
    """Compile each layer and the loss (torch.compile): faster steps, a first one that takes a minute longer. None: on
    GPUs."""
    deterministic: Annotated[bool, Field(strict=True)] = False
    """Only deterministic kernels: two runs of one layout give bit-identical weights. Slower on GPUs."""
    hang_timeout_s: Annotated[float, Field(gt=0, le=1e6)] = 1_800.0
    """Seconds without progress after which a run is taken for hung: every rank writes its stacks and exits with 77.
    Must exceed the longest of: waiting for the last rank to start; reading the data and the checkpoint to compare
    checksums; building or loading the model; a step, the first with its compilation, the last that is profiled with the
    writing of its trace; an evaluation in one mode; a save, with the one before it if that is not written yet. Time in
    which processes are suspended counts."""
    model: ModelConfig
    data: DataConfig
    stages: Annotated[list[StageConfig], Field(min_length=1)]
    attention: LighthouseConfig = LighthouseConfig()
    dense_layers: list[Annotated[int, Field(strict=True, ge=0)]] = Field(default_factory=list)
    """Layers that stay dense in a Lighthouse stage."""
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    memory: MemoryConfig = MemoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    profile: ProfileConfig = ProfileConfig()

    @property
    def activation_dtype(self) -> str:
        """`compute_dtype`, or `dtype` where it is left out."""
        return self.compute_dtype or self.dtype

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def padded_len(self) -> int:
        """Tokens that a sequence is padded to, at its end: with Lighthouse attention the same for every layout."""
        if self._uses_lighthouse:
            return self.attention.padded_length(self.seq_len)
        return self.seq_len + -self.seq_len % self.parallel.num_chunks

    @property
    def _uses_lighthouse(self) -> bool:
        evaluated = self.eval.modes if self.eval.sequences else []
        return "lighthouse" in {*evaluated, *(stage.mode for stage in self.stages)}

    def compiles(self, device: str) -> bool:
        """Whether layers and loss are compiled on a device of this type: `attention.check_finite` waits for each."""
        wanted = device == "cuda" if self.compile is None else self.compile
        return wanted and not (self.attention.check_finite and self._uses_lighthouse)

    @property
    def recomputed_layers(self) -> int:
        """How many layers, the first ones, run again in backward."""
        if self.memory.recompute == "none":
            return 0
        wanted, layers = self.memory.recompute_layers, self.model.num_layers
        return layers if wanted is None else wanted

    def _check_memory(self) -> None:
        memory, layers = self.memory, self.model.num_layers
        if memory.recompute == "none" and memory.recompute_layers:
            raise ConfigError(
                f"memory.recompute_layers {memory.recompute_layers}, but memory.recompute is none; set that to "
                f"selective or full, or leave recompute_layers out"
            )
        if memory.recompute_layers is not None and memory.recompute_layers > layers:
            raise ConfigError(f"memory.recompute_layers {memory.recompute_layers}: the model has {layers} layers")
        if memory.offload_layers > self.recomputed_layers:
            raise ConfigError(
                f"memory.offload_layers {memory.offload_layers}: only layers that are recomputed can be offloaded, "
                f"here {self.recomputed_layers}; lower it, or recompute more by memory.recompute: selective and "
                f"recompute_layers"
            )
        if self.compile and not self.compiles("cuda"):
            raise ConfigError(
                "attention.check_finite waits for the GPU, which a compiled layer cannot; set compile: false"
            )

    def _check_profile(self) -> None:
        self.profile.check_device(self.device)
        if self.profile.range is not None and self.profile.range[0] > self.total_steps:
            raise ConfigError(
                f"profile.steps {self.profile.steps}: the run ends with step {self.total_steps}; begin at most there"
            )

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
                f"{nearest_multiples(self.global_batch_size, per_pass)}"
            )
        attention = self.attention
        if self._uses_lighthouse:
            attention = attention.resolve_padded(self.seq_len, parallel.num_chunks)
        parallel.check_exchange(self.model, self.activation_dtype, self.device)
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
        self._check_memory()
        self._check_profile()
        if self.eval.sequences % parallel.dp:
            raise ConfigError(
                f"eval.sequences {self.eval.sequences} is not a multiple of dp {parallel.dp}; nearest legal: "
                f"{nearest_multiples(self.eval.sequences, parallel.dp)}"
            )
        return self.model_copy(update={"parallel": parallel, "attention": attention})
