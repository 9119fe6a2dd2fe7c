"""The `lhcp` command. Imports no torch: the processes that it starts do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import lhcp
from lhcp import config_file
from lhcp.checks import check_files
from lhcp.config import ConfigError
from lhcp.launch import torchrun

if TYPE_CHECKING:
    from lhcp.data import DatasetIndex

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the configuration, such as optim.lr=1e-3."),
]

app = typer.Typer(
    help="Long-sequence training with Lighthouse attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Token files.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def main() -> None:
    """Entry point: what the user can correct ends in one message on stderr and exit code 2."""
    try:
        app()
    except (ConfigError, OSError) as error:
        message = str(error).replace("\n", "\n       ")  # lines of one message, aligned
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lhcp {lhcp.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    overrides: Overrides = None,
) -> None:
    """Train on this machine, one process per rank (parallel.dp x parallel.cp)."""
    run = config_file.load(config, overrides or ())
    nproc = (run.parallel.dp or 1) * run.parallel.cp
    check_files(run.resolve(nproc))  # a wrong value ends here, before any process starts
    raise typer.Exit(torchrun.run(config, overrides or (), nproc))


@data_app.command()
def prepare(
    inputs: Annotated[list[Path], typer.Argument(help="Text or JSONL files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    held_out: Annotated[float, typer.Option(help="Share of the documents kept for evaluation.")] = 0.05,
    text_key: Annotated[str, typer.Option(help="Where a JSONL line has its text.")] = "text",
    suffix: Annotated[list[str] | None, typer.Option(help="Also read text files that end so, such as .jl.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the dataset that is there.")] = False,
) -> None:
    """Turn files into tokens that training reads."""
    from lhcp import data

    suffixes = (*data.TEXT_SUFFIXES, *(suffix or ()))
    index = data.prepare(inputs, out, held_out=held_out, text_key=text_key, suffixes=suffixes, overwrite=overwrite)
    _print_summary(out, index)


def _print_summary(out: Path, index: DatasetIndex) -> None:
    read = index.sources
    print(f"{out}: {index.tokenizer} tokenizer, vocabulary of {index.vocab_size:,}")
    print(
        f"  read      {read.files:,} files, {read.documents:,} documents "
        f"(dropped {read.duplicates:,} duplicate, {read.empty:,} empty)"
    )
    for name, split in index.splits.items():
        label = name.replace("_", " ")
        print(f"  {label:8}  {split.tokens:,} tokens, {split.documents:,} documents")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    overrides: Overrides = None,
) -> None:
    """Train a small model on this machine's CPU, from text to a loss curve."""
    from lhcp.demo import run

    raise typer.Exit(run(out, overrides or []))
