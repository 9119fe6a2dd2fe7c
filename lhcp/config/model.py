"""The shape of a model."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lhcp.config.section import PositiveInt, Section, WrittenPath


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
    init_from: WrittenPath | None = None
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
