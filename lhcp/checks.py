"""What only the disk can tell about a configuration, before anything is started. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from lhcp.config import ConfigError, RunConfig
from lhcp.data import SplitName, TokenDataset
from lhcp.metrics import EVENTS_FILE, METRICS_FILE

CONFIG_FILE = "config.yaml"
"""The resolved configuration in a run folder."""


def check_files(config: RunConfig) -> None:
    """Check the data and the run folder.

    Raises:
        ConfigError: no data, too little of it, tokens the model cannot hold, or a run folder in use.
    """
    _check_split(config, "train", 1)
    if config.eval.sequences:
        _check_split(config, "held_out", config.eval.sequences)
    _check_writable(config.output_dir)
    for name in (CONFIG_FILE, METRICS_FILE, EVENTS_FILE):
        if (config.output_dir / name).exists():
            raise ConfigError(f"output_dir {config.output_dir} already holds a run; choose another folder")


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ConfigError(f"output_dir {folder}: {existing} is not a folder; choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"output_dir {folder}: no permission to write in {existing}; choose another")


def _check_split(config: RunConfig, split: SplitName, sequences: int) -> None:
    dataset = TokenDataset(config.data.path, split)
    if dataset.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size {config.model.vocab_size} is smaller than the vocabulary of {dataset.vocab_size} in "
            f"{config.data.path}; set it to at least {dataset.vocab_size}"
        )
    if dataset.num_sequences(config.seq_len) < sequences:
        raise ConfigError(
            f"the {split} split in {config.data.path} has {dataset.num_tokens} tokens, too few for {sequences} "
            f"sequence(s) of seq_len {config.seq_len}; prepare more text, or use fewer or shorter sequences"
        )
