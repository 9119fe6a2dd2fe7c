"""What only the disk can tell about a configuration, before anything is started. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from lhcp.checkpoint.compare import check_meaning
from lhcp.checkpoint.manifest import DataEntry
from lhcp.checkpoint.resume import LAST, first_readable
from lhcp.config import ConfigError, RunConfig
from lhcp.config_file import CONFIG_FILE
from lhcp.data import SplitName, TokenDataset
from lhcp.metrics import EVENTS_FILE, METRICS_FILE


def check_files(config: RunConfig, resume: str | None = None, allowed: Collection[str] = ()) -> None:
    """Check the data, the run folder, and the checkpoint to go on from, as far as its manifest tells.

    Args:
        config: resolved.
        resume: which checkpoint, see `lhcp.checkpoint.resume.candidates`; None: a new run.
        allowed: see `lhcp.checkpoint.compare.check_meaning`.

    Raises:
        ConfigError: no data, too little of it, tokens the model cannot hold, a run folder in use, or a checkpoint that
            is missing, damaged or of another configuration.
    """
    check_data(config)
    check_writable("output_dir", config.output_dir)
    if resume is not None:
        if checkpoint := first_readable(config.output_dir, resume):
            check_meaning(checkpoint, config, data_entry(config), allowed)
    elif holds_run(config.output_dir):
        raise ConfigError(
            f"output_dir {config.output_dir} already holds a run; go on with it by --resume {LAST}, or choose another "
            f"folder"
        )


def check_data(config: RunConfig) -> None:
    """Check the data alone.

    Raises:
        ConfigError: no data, too little of it, or tokens the model cannot hold.
    """
    check_split(config, "train", 1)
    if config.eval.sequences:
        check_split(config, "held_out", config.eval.sequences)


def check_host_memory(config: RunConfig, ranks: int) -> None:
    """Refuse inputs of layers, in pinned host memory, that this machine has not.

    Args:
        config: resolved.
        ranks: on this machine.

    Raises:
        ConfigError: naming how many layers it has memory for.
    """
    layers, meminfo = config.memory.offload_layers, Path("/proc/meminfo")
    if not layers or not meminfo.exists():
        return
    (free,) = (int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable" in line)
    tokens = config.micro_batch_size * config.padded_len // config.parallel.cp
    row = ranks * tokens * config.model.dim * {"bfloat16": 2, "float32": 4, "float64": 8}[config.activation_dtype]
    if layers * row > free:
        raise ConfigError(
            f"memory.offload_layers {layers} takes {layers * row / 2**30:.1f} GiB of host memory for the {ranks} "
            f"rank(s) of this machine, which has {free / 2**30:.1f} GiB free: enough for {free // row} layer(s). Lower "
            f"it, or raise parallel.cp"
        )


def holds_run(folder: Path) -> bool:
    """Whether a run has begun there."""
    return any((folder / name).exists() for name in (CONFIG_FILE, METRICS_FILE, EVENTS_FILE))


def data_entry(config: RunConfig) -> DataEntry:
    """The dataset that a run trains on, as a checkpoint names it.

    Raises:
        ConfigError: there is none, or its index is damaged.
    """
    dataset = TokenDataset(config.data.path, "train")
    return DataEntry(fingerprint=dataset.fingerprint, tokenizer=dataset.index.tokenizer, vocab_size=dataset.vocab_size)


def check_writable(name: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written to.

    Raises:
        ConfigError: calling it `name`.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ConfigError(f"{name} {folder}: {existing} is not a folder; choose another")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{name} {folder}: no permission to write in {existing}; choose another")


def check_split(config: RunConfig, split: SplitName, sequences: int) -> None:
    """Check that a split has so many sequences, of tokens that the model can hold.

    Raises:
        ConfigError: it has not.
    """
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
