"""Lighthouse attention: its numbers and their constraints."""

from __future__ import annotations

from functools import cache
from math import lcm
from typing import Annotated, Literal

from pydantic import Field

from lhcp.config.section import ConfigError, PositiveInt, Section, nearest_multiples


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
    """Raise FloatingPointError when a score is not finite. Costs a wait for the GPU per layer, and a graph break."""

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
        return self if self._fits(seq_len, num_chunks) else _resolved(self, seq_len, num_chunks)

    def padded_length(self, seq_len: int) -> int:
        """The shortest length of at least `seq_len` that attention takes, whatever the layout.

        What follows the tokens is padding, which `lighthouse_attention` leaves out by `valid_len`. `topk`, which a
        sequence may be too short for, is left to `resolve`.

        Raises:
            ConfigError: no length would do, because of `num_strata` and `topk`.
        """
        if seq_len < 1:
            raise ConfigError(f"seq_len {seq_len}: must be at least 1")
        if not (units := self._units()):
            raise ConfigError(self._no_strata(seq_len, 1))
        if self._dilation_divides(seq_len) and any(seq_len % (s * self.coarsest_window) == 0 for s in units):
            return seq_len
        return min(seq_len + -seq_len % unit for unit in units.values())

    def too_short(self, seq_len: int) -> bool:
        """Whether sequences of `seq_len` tokens, padded, have fewer coarsest entries than `topk`: evaluated densely.

        Raises:
            ConfigError: as for `padded_length`.
        """
        return self.topk > self.padded_length(seq_len) // self.coarsest_window

    def resolve_padded(self, seq_len: int, num_chunks: int = 1) -> LighthouseConfig:
        """`resolve`, for sequences of `seq_len` tokens that are padded to `padded_length`; messages name `seq_len`."""
        units, strata = self._units(), self.num_strata
        if self.topk > (entries := -(-seq_len // self.coarsest_window)) and not units:
            raise ConfigError(self._too_short(f"{seq_len}", entries * self.coarsest_window))
        if not units or (strata is not None and strata % num_chunks):
            raise ConfigError(self._no_strata(seq_len, num_chunks))
        length = self.padded_length(seq_len)
        if (derived := self._derived(length)) is not None and derived % num_chunks:
            raise ConfigError(self.model_copy(update={"num_strata": derived})._no_strata(seq_len, num_chunks))
        if self.too_short(seq_len):
            padded = f" (padded to {length})" if length > seq_len else ""
            raise ConfigError(self._too_short(f"{seq_len}{padded}", length))
        return self.resolve(length, num_chunks)

    def _no_strata(self, seq_len: int, num_chunks: int) -> str:
        """That `num_strata`, or what it would become, is not legal at any length, and what would be."""
        legal = [s for s in range(num_chunks, self.topk // 2 + 1, num_chunks) if self.topk % s == 0]
        unpadded = [s for s in legal if seq_len % (s * self.coarsest_window) == 0]
        none = f"none is valid here: topk must be a multiple of {2 * num_chunks}"
        valid = f"valid: {unpadded or legal}" if legal else none
        if self.num_strata is None:
            multiple = f"no multiple of 2 x max_cp = {2 * self.max_cp} is legal for topk {self.topk}"
            return f"num_strata is unset, and {multiple}; {valid}"
        return (
            f"num_strata {self.num_strata} is not legal: {self._broken_by(self.num_strata, None, num_chunks)}; {valid}"
        )

    def _too_short(self, seq_len: str, length: int) -> str:
        return (
            f"topk {self.topk} exceeds the {length // self.coarsest_window} coarsest entries of seq_len {seq_len} "
            f"(num_levels {self.num_levels}, pooling_factor {self.pooling_factor}); it must be at most that, or "
            f"seq_len at least {self.topk * self.coarsest_window}"
        )

    def _units(self) -> dict[int, int]:
        """What padded lengths are multiples of, by `num_strata`, or by all that it may become if unset, ascending."""
        step = 2 * self.max_cp
        derivable = range(step * -(-self.topk // (128 * step)), self.topk // 2 + 1, step)
        known = derivable if self.num_strata is None else [self.num_strata]
        window = lcm(self.coarsest_window, self.dilation if self.scorer == "dilated" else 1)
        return {s: s * window for s in known if self.topk % s == 0 and 2 * s <= self.topk}

    def _derived(self, seq_len: int) -> int | None:
        """What `num_strata` becomes where it is left out: whatever the layout, so that all select the same."""
        units = self._units()
        whole = [s for s, unit in units.items() if seq_len % unit == 0]
        return next(iter(whole or [s for s in units if seq_len % (s * self.coarsest_window) == 0]), None)

    def _dilation_divides(self, length: int) -> bool:
        return self.scorer == "norm" or length % self.dilation == 0

    def _fits(self, seq_len: int, num_chunks: int) -> bool:
        """Whether nothing is to be fixed or refused: cheap, since a layer asks at every call."""
        strata = self.num_strata
        return (
            strata is not None
            and seq_len % (self.coarsest_window * num_chunks) == 0
            and self.topk % strata == seq_len // self.coarsest_window % strata == strata % num_chunks == 0
            and 2 * strata <= self.topk <= seq_len // self.coarsest_window
            and self._dilation_divides(seq_len // num_chunks)
        )

    @property
    def strata(self) -> int:
        """`num_strata` of a resolved configuration."""
        assert self.num_strata is not None, "call resolve(seq_len) first"
        return self.num_strata

    def subsequence_length(self, seq_len: int) -> int:
        """S, the gathered entries of one sequence: N / p^(L-1) + (L-1) p topk."""
        return seq_len // self.coarsest_window + (self.num_levels - 1) * self.pooling_factor * self.topk

    def _broken_by(self, strata: int, seq_len: int | None, num_chunks: int) -> str:
        """The first constraint that `strata` breaks, in words; of those on a length only where there is one."""
        if self.topk % strata:
            return f"it does not divide topk {self.topk}"
        if seq_len is not None and seq_len % (strata * self.coarsest_window):
            uneven = f"a stratum of {seq_len // strata} tokens is not a multiple of {self.coarsest_window}"
            reason = f"it does not divide seq_len {seq_len}" if seq_len % strata else uneven
            return f"{reason} (a sequence can be padded: see padded_length)"
        if strata % num_chunks:
            return (
                f"it does not divide evenly over the {num_chunks} chunks of the context-parallel layout (a chunk is a "
                f"whole number of strata)"
            )
        return f"it leaves a budget of {self.topk // strata} entry per stratum, fewer than 2"


@cache
def _resolved(config: LighthouseConfig, seq_len: int, num_chunks: int) -> LighthouseConfig:
    if seq_len % (config.coarsest_window * num_chunks):
        raise ConfigError(
            f"seq_len {seq_len} is not a multiple of pooling_factor^(num_levels-1) = {config.coarsest_window} tokens "
            f"in each of {num_chunks} chunk(s); nearest legal: {_nearest_lengths(config, seq_len, num_chunks)}"
        )
    if config.topk > seq_len // config.coarsest_window:
        raise ConfigError(config._too_short(f"{seq_len}", seq_len))
    legal = legal_num_strata(config, seq_len)
    fitting = [s for s in legal if s % num_chunks == 0]
    advice = f"valid: {fitting}" if fitting else f"none is valid here: topk must be a multiple of {2 * num_chunks}"
    strata = config.num_strata
    if strata is None:
        strata = config._derived(seq_len)
        if strata is None:
            raise ConfigError(
                f"num_strata is unset, and no multiple of 2 x max_cp = {2 * config.max_cp} is legal for seq_len "
                f"{seq_len} and topk {config.topk}; {advice}"
            )
    if strata not in fitting:
        raise ConfigError(
            f"num_strata {strata} is not legal: {config._broken_by(strata, seq_len, num_chunks)}; {advice}"
        )
    if not config._dilation_divides(seq_len // num_chunks):
        raise ConfigError(
            f"dilation {config.dilation} does not divide the chunk of {seq_len // num_chunks} tokens; nearest legal "
            f"seq_len: {_nearest_lengths(config, seq_len, num_chunks)}"
        )
    return config.model_copy(update={"num_strata": strata})


def _nearest_lengths(config: LighthouseConfig, seq_len: int, num_chunks: int) -> str:
    """Around `seq_len`, in words; of the finest layout, unless `num_strata` does not allow this one."""
    units = [unit for strata, unit in config._units().items() if strata % num_chunks == 0]
    dilation = config.dilation if config.scorer == "dilated" else 1
    unit = units[0] if units else num_chunks * lcm(config.coarsest_window, dilation)
    return nearest_multiples(seq_len, unit, config.topk * config.coarsest_window)


def legal_num_strata(config: LighthouseConfig, seq_len: int) -> list[int]:
    """Every legal `num_strata` for N = `seq_len`, ascending: divides topk and N, whole coarsest windows, 2 <= m."""
    coarsest = seq_len // config.coarsest_window
    if seq_len % config.coarsest_window or config.topk > coarsest:
        return []
    return [s for s in range(1, config.topk // 2 + 1) if config.topk % s == 0 and coarsest % s == 0]
