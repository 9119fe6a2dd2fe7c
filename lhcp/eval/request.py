"""What one call of `lhcp eval` asks for, and the configurations that it comes to. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lhcp import config_file
from lhcp.checkpoint.manifest import Checkpoint
from lhcp.checks import check_split
from lhcp.config import ConfigError, EvalConfig, EvalMode, RunConfig, Section, StageConfig
from lhcp.config.section import nearest_multiples
from lhcp.data import ByteTokenizer
from lhcp.eval.prompts import DEPTHS, SHORTEST

Count = Annotated[int, Field(strict=True, ge=1, le=10**9)]
Percent = Annotated[float, Field(ge=0, le=100)]
_FIRST_CONTEXT = 4_096
# What a checkpoint's tensors have no shape for, so that a configuration may change it.
_FREE = {"rope_theta", "rope_scaling", "norm_eps", "init_from"}


class EvalRequest(Section):
    """One call, as the processes that evaluate are given it."""

    task: Literal["loss", "passkey"]
    checkpoint: Path
    """Its folder."""
    config: Path | None = None
    """Run file, where the checkpoint has no configuration, or in place of it."""
    overrides: tuple[str, ...] = ()
    """KEY=VALUE, on top of it."""
    modes: tuple[EvalMode, ...] = ("dense",)
    lengths: tuple[Count, ...] = ()
    """Tokens of a sequence or prompt. Empty: the run's, for passkeys also 4,096 and its doubles below."""
    samples: Count | None = None
    """Held-out sequences (None: as many as the run evaluates), or prompts of each length and depth."""
    depths: tuple[Percent, ...] = DEPTHS
    """Of passkeys."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of passkeys."""


@dataclass(frozen=True)
class Case:
    """One length in one mode."""

    mode: EvalMode
    attended: EvalMode
    """As `mode`, but `dense` where a sequence is too short for the Lighthouse configuration."""
    config: RunConfig
    """Resolved, for sequences of that length."""


@dataclass(frozen=True)
class Prepared:
    """A request that can be carried out, as far as this process can tell."""

    checkpoint: Checkpoint
    ranks: int
    samples: int
    cases: tuple[Case, ...]


def prepare(request: EvalRequest) -> Prepared:
    """Check a request, and lay out what it asks for.

    Raises:
        ConfigError: no checkpoint, a wrong value, or data that is missing or too little.
    """
    checkpoint = Checkpoint.open(request.checkpoint)
    config = _config(request, checkpoint)
    parallel = config.parallel
    dp = parallel.dp or 1
    samples = _samples(request, config)
    if samples % dp:
        raise ConfigError(
            f"{samples} samples do not divide evenly over parallel.dp {dp}; nearest: {nearest_multiples(samples, dp)}"
        )
    if request.task == "passkey":
        _check_tokenizer(checkpoint)
        if short := [length for length in request.lengths if length < SHORTEST]:
            raise ConfigError(f"context {short[0]}: a passkey prompt has at least {SHORTEST} tokens")
    if "lighthouse" in request.modes and not config.attention.too_short(config.seq_len):
        # Strata are fixed at the run's own length: at every other the model selects in as many.
        attention = config.attention.resolve_padded(config.seq_len, parallel.num_chunks)
        config = config.model_copy(update={"attention": attention})
    evaluation = EvalConfig(sequences=samples)
    config = config.model_copy(update={"global_batch_size": dp, "eval": evaluation})
    cases = [_case(config, mode, length) for length in request.lengths or _lengths(request, config)
             for mode in request.modes]  # fmt: skip
    if request.task == "loss":
        for case in cases:
            check_split(case.config, "held_out", samples)
    return Prepared(checkpoint, dp * parallel.cp, samples, tuple(cases))


def _config(request: EvalRequest, checkpoint: Checkpoint) -> RunConfig:
    """Of the run that the model is from, but for what makes training fit and fast."""
    data: Mapping[Any, Any] | None = checkpoint.manifest.config
    if request.config is not None:
        data = config_file.read_mapping(request.config)
    if data is None:
        raise ConfigError(
            f"{request.checkpoint} is of an imported model, and does not say how it attends nor what it reads; give a "
            f"run's file by --config"
        )
    model = checkpoint.manifest.model
    layout = dict(data.get("parallel") or {}) | {"dp": 1, "cp": 1}
    training = {"micro_batch_size": 1, "memory": {}, "profile": {}, "eval": data.get("eval") or {}, "compile": False}
    mapping = dict(data) | training | {"model": model.model_dump(), "parallel": layout}
    config = config_file.from_mapping(mapping, request.overrides)
    given, saved = config.model.model_dump(exclude=_FREE), model.model_dump(exclude=_FREE)
    if wrong := [key for key in saved if given[key] != saved[key]]:
        raise ConfigError(
            f"model.{wrong[0]}: given {given[wrong[0]]}, but the checkpoint's is {saved[wrong[0]]}; leave it out"
        )
    return config


def _samples(request: EvalRequest, config: RunConfig) -> int:
    if request.samples is not None:
        return request.samples
    if request.task == "passkey":
        return 20 * (config.parallel.dp or 1)
    if not config.eval.sequences:
        raise ConfigError("the run has no eval.sequences; say by --sequences how many held-out ones to read")
    return config.eval.sequences


def _lengths(request: EvalRequest, config: RunConfig) -> list[int]:
    if request.task == "loss":
        return [config.seq_len]
    doubles = [_FIRST_CONTEXT << n for n in range(32)]
    return [length for length in doubles if length < config.seq_len] + [config.seq_len]


def _case(config: RunConfig, mode: EvalMode, length: int) -> Case:
    attended: EvalMode = "dense" if mode == "lighthouse" and config.attention.too_short(length) else mode
    stage = StageConfig(mode="lighthouse" if attended == "lighthouse" else "dense", steps=1)
    changed = config.model_copy(update={"seq_len": length, "stages": [stage]})
    return Case(mode, attended, changed.resolve((config.parallel.dp or 1) * config.parallel.cp))


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    data = checkpoint.manifest.data
    if data is None or data.tokenizer != ByteTokenizer.name:
        found = f"the {data.tokenizer} tokenizer" if data else "an unknown tokenizer"
        raise ConfigError(
            f"{checkpoint.folder} was trained on tokens of {found}; passkeys are asked for in bytes, so evaluate a "
            f"model that was trained on what `lhcp data prepare` wrote"
        )
