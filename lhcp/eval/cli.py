"""`lhcp eval`. Imports no torch: the processes that it starts do."""

from __future__ import annotations

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from lhcp.checkpoint.resume import find_checkpoint
from lhcp.checks import check_writable
from lhcp.config import ConfigError
from lhcp.config.validation import validate
from lhcp.eval.prompts import DEPTHS
from lhcp.eval.report import show, write
from lhcp.eval.request import EvalRequest, prepare
from lhcp.launch import torchrun
from lhcp.launch.cli import Overrides

app = typer.Typer(help="What a trained model can do.", no_args_is_help=True)

Run = Annotated[Path, typer.Argument(help="A run folder, or a checkpoint.")]
Step = Annotated[int | None, typer.Option(help="Steps of the checkpoint, if not the newest of the run.")]
Mode = Annotated[
    list[str] | None,
    typer.Option(help="How the model attends: dense (if left out), lighthouse or no_attention; can be repeated."),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A run's YAML file, if not the one that the checkpoint holds.")
]
Out = Annotated[Path | None, typer.Option(help="Folder for the result as JSON, and a picture of passkeys.")]


@app.command()
def loss(
    run: Run,
    step: Step = None,
    mode: Mode = None,
    lengths: Annotated[
        str | None, typer.Option(help="Tokens of a sequence, such as 4096,8192, if not the run's seq_len.")
    ] = None,
    sequences: Annotated[
        int | None, typer.Option(help="Held-out sequences, the first ones, if not eval.sequences of the run.")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    out: Out = None,
) -> None:
    """Held-out loss of a model, on one process if parallel.cp or parallel.dp is not set."""
    values = {"task": "loss", "lengths": _numbers("--lengths", lengths, int), "samples": sequences}
    _evaluate(run, step, mode, config, overrides, out, values)


@app.command()
def passkey(
    run: Run,
    step: Step = None,
    mode: Mode = None,
    contexts: Annotated[
        str | None,
        typer.Option(help="Tokens of a prompt, such as 4096,8192; if left out, 4096 and doubles up to seq_len."),
    ] = None,
    depths: Annotated[str, typer.Option(help="Where the digit stands, per cent of the noise before it.")] = ",".join(
        f"{depth:g}" for depth in DEPTHS
    ),
    samples: Annotated[int | None, typer.Option(help="Prompts of each context and depth; left out, 20 x dp.")] = None,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    config: ConfigFile = None,
    overrides: Overrides = None,
    out: Out = None,
) -> None:
    """How often a model repeats a digit hidden in noise, by where it stands and how far back; chance is 10%."""
    values = {"task": "passkey", "lengths": _numbers("--contexts", contexts, int), "samples": samples, "seed": seed,
              "depths": _numbers("--depths", depths, float)}  # fmt: skip
    _evaluate(run, step, mode, config, overrides, out, values)


def _evaluate(
    run: Path,
    step: int | None,
    modes: list[str] | None,
    config: Path | None,
    overrides: list[str] | None,
    out: Path | None,
    values: dict[str, Any],
) -> None:
    """Check a request, start the processes, and show what they found."""
    checkpoint = find_checkpoint(run, step)
    if out is not None:
        check_writable("--out", out)
    given = {key: value for key, value in values.items() if value is not None}
    request = validate(
        EvalRequest,
        given
        | {
            "checkpoint": checkpoint.folder,
            "config": config,
            "overrides": overrides or [],
            "modes": modes or ["dense"],
        },
    )
    prepared = prepare(request)
    if find_spec("torch") is None:
        raise ConfigError(torchrun.NO_TORCH)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        words = [request.model_dump_json(), str(file)]
        argv = torchrun.of_module("lhcp.eval", words, prepared.ranks)
        if code := torchrun.run_forwarding(argv, torchrun.environment(prepared.ranks)):
            raise typer.Exit(code)
        result = json.loads(file.read_text(encoding="utf-8"))
    show(result)
    if out is not None:
        for path in write(result, out):
            print(path)


def _numbers(option: str, text: str | None, kind: type[int] | type[float]) -> list[float] | None:
    """Numbers with commas between them.

    Raises:
        ConfigError: it is something else.
    """
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: must be numbers with commas between them, such as 4096,8192") from None
