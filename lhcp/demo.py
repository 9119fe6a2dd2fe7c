"""`lhcp demo`: the main job in small, on this machine's CPU and on text that every Python installation has."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lhcp import config_file, metrics
from lhcp.checks import check_files
from lhcp.config import ConfigError, RunConfig
from lhcp.config_file import CONFIG_FILE
from lhcp.data import TokenDataset, bigram_entropy, prepare, unigram_entropy
from lhcp.launch import torchrun
from lhcp.plot import plot_loss

CONFIG = Path(torchrun.__file__).parent / "configs" / "demo.yaml"
TARGET = 2.8
"""Held-out nats per byte that a working run stays under: between the unigram and the trained model."""


def run(out: Path, overrides: Sequence[str]) -> int:
    """Prepare the text, train, and compare the held-out loss with what it must beat.

    Args:
        out: run folder; the tokens are written to `out`/data.
        overrides: `a.b=c`, on top of `launch/configs/demo.yaml`.

    Returns:
        0; 1 when training failed or missed what it must beat.

    Raises:
        ConfigError: a wrong override, or a run folder in use.
    """
    overrides = [f"output_dir={_quoted(out)}", f"data.path={_quoted(out / 'data')}", *overrides]
    config = config_file.load(CONFIG, overrides)
    ranks = (config.parallel.dp or 1) * config.parallel.cp
    config = config.resolve(ranks)
    if (out / CONFIG_FILE).exists():
        raise ConfigError(
            f"{out} already holds a run; give another folder by --out, or go on with it: lhcp train "
            f"{out / CONFIG_FILE} --resume last"
        )
    if not config.data.path.exists():
        prepare(standard_library(), config.data.path)
    check_files(config)
    _describe(config, ranks)
    code = torchrun.run(CONFIG, overrides, ranks)
    return code or _report(config)


def standard_library() -> list[Path]:
    """The source files of Python's standard library, without its tests and installed packages.

    Raises:
        ConfigError: this Python has no sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib"}
    files = [path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts)]
    if not files:
        raise ConfigError(f"no Python sources in {root}; use a Python that has its standard library as files")
    return files


def _describe(config: RunConfig, ranks: int) -> None:
    text, attention = TokenDataset(config.data.path, "train"), config.attention
    print(
        f"text: {text.num_tokens:,} bytes of Python's standard library, and its held-out files\n"
        f"ranks: {ranks} processes, each sequence of {config.seq_len:,} tokens over {config.parallel.cp} of them "
        f"({config.parallel.sharding})\n"
        f"attention: S = {attention.subsequence_length(config.padded_len):,} of {config.seq_len:,} tokens in "
        f"{attention.num_strata} strata (L={attention.num_levels}, p={attention.pooling_factor}, "
        f"k={attention.topk})\n"
        f"stages: {', then '.join(f'{stage.steps} steps {stage.mode}' for stage in config.stages)}\n",
        flush=True,
    )


def _report(config: RunConfig) -> int:
    """Print the outcome and draw it; 0 when the run learned, and learned to attend."""
    text = TokenDataset(config.data.path, "train")
    tokens = text.read(0, text.num_tokens)
    unigram, bigram = unigram_entropy(tokens), bigram_entropy(tokens)
    events = [event for event in metrics.read_events(config.output_dir) if event["event"].startswith(metrics.HELD_OUT)]
    losses = {event["event"]: event["loss"] for event in events}
    dense, without = losses[metrics.HELD_OUT], losses[f"{metrics.HELD_OUT}_no_attention"]

    table = Table(title="held-out loss of the finished, dense model")
    table.add_column("")
    table.add_column("nats per byte", justify="right")
    table.add_row("entropy of single bytes in the text", f"{unigram:.3f}")
    table.add_row("entropy of a byte given the one before", f"{bigram:.3f}")
    table.add_row("the model with every attention output zeroed", f"{without:.3f}")
    table.add_row("the model", f"{dense:.3f}", style="bold")
    Console().print(table)
    picture = plot_loss(config.output_dir, references={"single bytes": unigram, "byte pairs": bigram})
    print(f"run folder: {config.output_dir}" + (f", loss curve: {picture}" if picture else ""))
    learned = dense < min(TARGET, without)
    if not learned:
        print(f"the run failed: {dense:.3f} must be below {TARGET} and below the loss without attention")
    return 0 if learned else 1


def _quoted(path: Path) -> str:
    """A path as a YAML string."""
    return "'" + str(path).replace("'", "''") + "'"
