"""One run at every layout of a number of ranks: does it compute what one process does?

    python -m benchmarks.layouts CONFIG --ranks 8 --out FILE.json [--set KEY=VALUE ...]

Each layout, `parallel.dp` times `parallel.cp`, is an ordinary run under torchrun. In float64 losses and gradient norms
must be the same (AdamW hides from the losses a factor that all gradients have in common). In another dtype losses may
stray from float64 twice as far as those of one process do: evidence beside that proof, since a selection that rounding
flips makes another curve, most of all at a high learning rate. Exit codes: 0 done, 1 a layout computes something else
or a run failed, 2 something that the user can correct.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import layer as layers
from benchmarks.common import Record, environment, make_way, table, write_json
from lhcp import config_file
from lhcp.checks import check_data
from lhcp.config import ConfigError, RunConfig
from lhcp.distributed.env import ProcessEnv
from lhcp.launch import torchrun
from lhcp.metrics import read_metrics, tell

NAME = "layouts"
TOLERANCE = 1e-9
"""Largest relative difference of two losses, or two gradient norms, in float64."""
HEADER = ["dtype", "dp", "cp", "steps", "loss, first", "last", "grad norm, last", "error", "at most"]
NOTE = (
    "A run against one process in float64. In float64 the error is the largest relative difference of a loss or a "
    "gradient norm; else the root mean square of the differences of losses, nats, in brackets in that of one process "
    f"of the same dtype, of which {layers.ROUNDING:g} are allowed."
)
Curve = dict[str, list[float]]
"""`losses` and `grad_norms` by step; not a number where one was not finite."""


class RunFailed(Exception):
    """Not all losses are there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run every layout and compare; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.layouts", description="Losses of every layout of a run.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--ranks", type=int, required=True, help="that the layouts share out")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args(argv)
    try:
        return _main(args.config, args.overrides, args.ranks, args.out)
    except (ConfigError, RunFailed) as error:
        tell(error)
        return 2 if isinstance(error, ConfigError) else 1


def _main(path: Path, overrides: Sequence[str], ranks: int, out: Path) -> int:
    if ranks < 2:
        raise ConfigError(f"--ranks {ranks}: must be at least 2")
    layouts = [(ranks // cp, cp) for cp in range(1, ranks + 1) if ranks % cp == 0]
    configs = [_at(path, overrides, dp, cp) for dp, cp in [(1, 1), *layouts]]
    check_data(configs[0])
    make_way(out)
    dtype = configs[0].activation_dtype
    with tempfile.TemporaryDirectory(prefix="layouts-") as folder:
        exact = _curve(path, [*overrides, "dtype=float64", "compute_dtype=null"], 1, 1, Path(folder) / "exact")
        found = [] if dtype == "float64" else [_curve(path, overrides, 1, 1, Path(folder) / "alone")]
        found += [_curve(path, overrides, dp, cp, Path(folder) / f"{dp}x{cp}") for dp, cp in layouts]
    shapes = layouts if dtype == "float64" else [(1, 1), *layouts]
    result: Record = {
        "benchmark": NAME,
        "config": configs[0].model_dump(mode="json"),
        "environment": environment(ProcessEnv.read().device(configs[0].device), dtype) | {"ranks": ranks},
        "exact": exact,
        **judged(dtype, exact, shapes, found),
    }
    write_json(out, result)
    print(table(HEADER, rows(result)), end="")
    if not result["passed"]:
        tell("a layout does not compute what one process does")
    return 0 if result["passed"] else 1


def _at(path: Path, overrides: Sequence[str], dp: int, cp: int) -> RunConfig:
    return config_file.load(path, [*overrides, f"parallel.dp={dp}", f"parallel.cp={cp}"]).resolve(dp * cp)


def _curve(path: Path, overrides: Sequence[str], dp: int, cp: int, run_dir: Path) -> Curve:
    """Of a run.

    Raises:
        RunFailed: it has said why.
    """
    layout = [f"parallel.dp={dp}", f"parallel.cp={cp}", f"output_dir={run_dir}"]
    if code := torchrun.run(path, [*overrides, *layout], dp * cp):
        raise RunFailed(f"the run of dp {dp}, cp {cp} ended with {code}: see above")
    records = read_metrics(run_dir)
    values = {"losses": "loss", "grad_norms": "grad_norm"}
    return {
        name: [math.nan if record[key] is None else record[key] for record in records] for name, key in values.items()
    }


def judged(dtype: str, exact: Curve, shapes: Sequence[tuple[int, int]], found: Sequence[Curve]) -> Record:
    """What differs, and whether it is more than rounding.

    Args:
        dtype: that runs compute in.
        exact: of one process in float64.
        shapes: dp and cp of the runs; first those of one process, if that computes in another dtype.
        found: of these runs.

    Returns:
        `passed`, `tolerance`, and for each run `dp`, `cp`, its curve and its `error`.
    """
    error = _largest_relative if dtype == "float64" else _root_mean_square
    runs: list[Record] = [
        {"dp": dp, "cp": cp, **curve, "error": error(curve, exact)}
        for (dp, cp), curve in zip(shapes, found, strict=True)
    ]
    tolerance = TOLERANCE if dtype == "float64" else layers.ROUNDING * runs[0]["error"]
    return {"passed": all(run["error"] <= tolerance for run in runs), "tolerance": tolerance, "runs": runs}


def _largest_relative(curve: Curve, exact: Curve) -> float:
    """Not a number where one of them is not."""
    relative = [abs(a - b) / abs(b) for name in exact for a, b in zip(curve[name], exact[name], strict=True)]
    return float(np.max(relative))


def _root_mean_square(curve: Curve, exact: Curve) -> float:
    squares = [(a - b) ** 2 for a, b in zip(curve["losses"], exact["losses"], strict=True)]
    return math.sqrt(sum(squares) / len(squares))


def rows(result: Record) -> list[list[str]]:
    """Lines of the table under `HEADER`."""
    dtype, tolerance = result["environment"]["dtype"], result["tolerance"]
    one = tolerance / layers.ROUNDING if dtype != "float64" else 0.0
    return [
        [
            *(dtype, str(run["dp"]), str(run["cp"]), str(len(run["losses"]))),
            f"{run['losses'][0]:.4f}",
            f"{run['losses'][-1]:.4f}",
            f"{run['grad_norms'][-1]:.4f}",
            f"{run['error']:.1e}" + (f" ({run['error'] / one:.2f})" if one else ""),
            f"{tolerance:.1e}",
        ]
        for run in result["runs"]
    ]


if __name__ == "__main__":
    sys.exit(main())
