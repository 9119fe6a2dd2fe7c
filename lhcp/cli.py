"""The `lhcp` command. Imports no torch: the processes that it starts do."""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import lhcp
from lhcp import config_file
from lhcp import plan as planning
from lhcp.checkpoint.resume import find_checkpoint
from lhcp.checks import check_files
from lhcp.config import ConfigError
from lhcp.eval import cli as eval_cli
from lhcp.launch import cli as launch_cli
from lhcp.launch import grid, torchrun
from lhcp.launch.cli import Overrides
from lhcp.launch.torchrun import NO_TORCH
from lhcp.metrics import tell

if TYPE_CHECKING:
    from lhcp.data import DatasetIndex

app = typer.Typer(
    help="Long-sequence training with Lighthouse attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Token files.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(eval_cli.app, name="eval")
app.add_typer(launch_cli.app, name="launch")


def main() -> None:
    """Entry point: what the user can correct ends in one message on stderr and exit code 2."""
    try:
        app()
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        tell(NO_TORCH)
        sys.exit(2)
    except (ConfigError, OSError) as error:
        tell(error)
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
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="WHICH",
            help="Go on with the run in output_dir: last, its newest checkpoint; last-good, its newest whole one; or "
            "the number of steps of one. From the beginning when it has none.",
        ),
    ] = None,
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Resume although this key, part of what the model computes, has changed."),
    ] = None,
    profile_steps: Annotated[
        str | None,
        typer.Option("--profile.steps", metavar="FIRST:LAST", help="Leave a trace of these steps in the run folder."),
    ] = None,
    profile_memory: Annotated[
        bool, typer.Option("--profile.memory", help="And a snapshot of the GPU's memory in them.")
    ] = False,
) -> None:
    """Train on this machine, one process per rank (parallel.dp x parallel.cp)."""
    overrides = list(overrides or ())
    overrides += [] if profile_steps is None else [f"profile.steps={profile_steps}"]
    overrides += ["profile.memory=true"] if profile_memory else []
    run = config_file.load(config, overrides)
    nproc = (run.parallel.dp or 1) * run.parallel.cp
    allowed = allow_change or []
    check_files(run.resolve(nproc), resume, allowed)  # a wrong value ends here, before any process starts
    if find_spec("torch") is None:
        raise ConfigError(NO_TORCH)
    flags = [] if resume is None else ["--resume", resume]
    flags += [word for key in allowed for word in ("--allow-change", key)]
    raise typer.Exit(torchrun.run(config, overrides, nproc, flags))


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="The run's YAML file.")],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs in all.")],
    gpu: Annotated[planning.GpuName, typer.Option(help="Their kind.", case_sensitive=False)],
    gpus_per_node: Annotated[int, typer.Option("--gpus-per-node", min=1, help="GPUs of one node.")] = 8,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, in bytes and seconds.")] = False,
) -> None:
    """Say what a run needs before it is paid for: memory, time, bytes, and the fastest settings that fit."""
    if grid.is_grid(config):
        common, elements = grid.load(config)
        raise ConfigError(
            f"{config} is a grid of {len(elements)} runs; plan {common}, with --set for what one of them changes, such "
            f"as {' '.join(f'--set {change}' for change in elements[0].overrides) or 'nothing'}"
        )
    found = planning.plan_run(config_file.load(config, overrides or ()), gpus, planning.GPUS[gpu], gpus_per_node)
    if as_json:
        print(json.dumps(planning.as_json(found), indent=2))
    else:
        print(planning.show(found), end="")


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="A run folder, the output_dir of a run; or one that jobs write to.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say how far a run is: its step, loss, speed, time left and last checkpoint."""
    from lhcp.status import holds_other_jobs, read_status, show, show_elements

    if not as_json and holds_other_jobs(run):
        show_elements(run, time.time())
        return
    found = read_status(run, time.time())
    if as_json:
        print(found.model_dump_json(indent=2))
    else:
        show(found)


app.command("submit")(launch_cli.submit_command)
app.command("logs")(launch_cli.logs_command)
app.command("cancel")(launch_cli.cancel_command)


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


@data_app.command()
def verify(folder: Annotated[Path, typer.Argument(help="Folder written by `lhcp data prepare`.")]) -> None:
    """Compare every byte of a dataset with its checksums."""
    from lhcp import data

    data.verify_shards(folder)
    splits = data.read_index(folder).splits.values()
    shards, tokens = sum(len(split.shards) for split in splits), sum(split.tokens for split in splits)
    print(f"{folder} is whole: {shards:,} shard(s), {tokens:,} tokens")


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
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, or a checkpoint.")],
    to: Annotated[Path, typer.Option(help="Folder to write.")],
    step: Annotated[int | None, typer.Option(help="Steps of the checkpoint, if not the newest of the run.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None, typer.Option(help="Of the weights, if not as they were saved.")
    ] = None,
) -> None:
    """Write a run's model as a Hugging Face Llama, for transformers and whatever else reads those."""
    from lhcp.hf.export import export_model

    checkpoint = find_checkpoint(run, step)

    done = export_model(checkpoint, to, dtype)
    manifest = checkpoint.manifest
    print(
        f"{to}: Llama of {done.parameters:,} parameters for up to {manifest.seq_len:,} tokens, step {manifest.step:,}"
    )
    print(f"  weights    {done.dtype}, {done.files:,} file(s), {_size(done.weight_bytes)}")
    print(f"  tokenizer  {'byte-level' if done.has_tokenizer else 'none: the checkpoint does not say which'}")
    if manifest.model.dim % manifest.model.num_heads:
        print("  note       transformers 5 reads no model whose num_heads does not divide its dim; transformers 4 does")


@app.command("import")
def import_(
    hf_dir: Annotated[Path, typer.Argument(help="A Hugging Face Llama: config.json and safetensors files.")],
    to: Annotated[Path, typer.Option(help="Checkpoint to write.")],
) -> None:
    """Make a checkpoint that runs can start from out of a Hugging Face Llama."""
    import yaml

    from lhcp.checkpoint.index import read_index
    from lhcp.hf.importer import import_model

    checkpoint = import_model(hf_dir, to)
    manifest, tensors = checkpoint.manifest, read_index(checkpoint).values()
    parameters, dtypes = sum(prod(tensor.shape) for tensor in tensors), sorted({tensor.dtype for tensor in tensors})
    written = sum(file.bytes for file in manifest.files.values())
    print(f"{to}: Llama of {parameters:,} parameters for up to {manifest.seq_len:,} tokens")
    print(f"  weights    {' and '.join(dtypes)}, {_size(written)}")
    print("  tokenizer  not imported: a run trains on what `lhcp data prepare` wrote")
    print("\nA run starts from it with these lines in its file:\n")
    print(yaml.safe_dump({"model": {"init_from": str(to)}}, allow_unicode=True), end="")


def _size(written: int) -> str:
    return f"{written / 1e9:,.2f} GB" if written >= 1e9 else f"{written / 1e6:,.2f} MB"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    overrides: Overrides = None,
) -> None:
    """Train a small model on this machine's CPU, from text to a loss curve."""
    from lhcp.demo import run

    raise typer.Exit(run(out, overrides or []))
