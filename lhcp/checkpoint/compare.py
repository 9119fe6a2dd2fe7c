"""What may not change silently when a run is resumed. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from lhcp.checkpoint.manifest import Checkpoint, DataEntry
from lhcp.config import ConfigError, RunConfig

# Keys that are part of what the model computes or of which tokens it sees; a section stands for its keys.
MEANING = ("model", "attention", "dense_layers", "seq_len", "global_batch_size", "seed", "dtype", "data")
# Keys of the model that no tensor's shape depends on.
_SHAPELESS = ("model.rope_theta", "model.rope_scaling", "model.norm_eps")
_HARMLESS = ("model.init_from", "attention.max_cp", "attention.check_finite")

Change = tuple[str, Any, Any]
"""Key, value in the checkpoint, value now."""


def check_meaning(checkpoint: Checkpoint, config: RunConfig, data: DataEntry, allowed: Collection[str]) -> list[Change]:
    """Compare a resolved configuration and its data with those that a checkpoint was made with.

    Args:
        checkpoint: of a run.
        config: to go on with.
        data: to go on with.
        allowed: keys or sections that may change although they change what the model computes.

    Returns:
        What has changed, to be told.

    Raises:
        ConfigError: a change that is not allowed, a name in `allowed` that needs no allowance, or fewer steps than
            are done.
    """
    unknown = [name for name in allowed if not _means(name)]
    if unknown:
        raise ConfigError(f"--allow-change {unknown[0]}: not a key that is held fixed; valid: {', '.join(MEANING)}")
    if checkpoint.manifest.step > config.total_steps:
        raise ConfigError(
            f"{checkpoint.folder} is after {checkpoint.manifest.step} steps, but the stages have {config.total_steps} "
            f"in all; lengthen one, or resume from an earlier checkpoint"
        )
    if checkpoint.manifest.config is None or checkpoint.manifest.data is None:
        raise ConfigError(f"{checkpoint.folder} is an imported model, not of a run; start from it with model.init_from")
    before = checkpoint.manifest.config | {"data": checkpoint.manifest.data.model_dump()}
    now = config.model_dump(mode="json") | {"data": data.model_dump()}
    changes = list(_changes(before, now))
    shapeless = (*_SHAPELESS, *_HARMLESS)
    misfits = [key for key, _, _ in changes if _covered(key, ["model"]) and not _covered(key, shapeless)]
    if misfits:
        raise ConfigError(
            f"the weights in {checkpoint.folder} do not fit the changed {', '.join(misfits)}; set it back, or start "
            f"another run"
        )
    refused = [change for change in changes if _means(change[0]) and not _covered(change[0], allowed)]
    if refused:
        lines = [f"{key}: {_short(was)} in the checkpoint, {_short(value)} now" for key, was, value in refused]
        flags = " ".join(f"--allow-change {key}" for key, _, _ in refused)
        raise ConfigError(
            "\n".join([f"{checkpoint.folder} is of a run that computes something else:", *lines])
            + f"\nset them back, or go on with these values all the same: {flags}"
        )
    return changes


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Iterator[Change]:
    for key in [*before, *(key for key in now if key not in before)]:
        was, value = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(value, dict):
            yield from _changes(was, value, f"{prefix}{key}.")
        elif was != value:
            yield f"{prefix}{key}", was, value


def _short(value: object) -> str:
    """A value as it is, but the beginning of a hash."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else repr(value)


def _means(key: str) -> bool:
    return _covered(key, MEANING) and key not in _HARMLESS


def _covered(key: str, names: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)
