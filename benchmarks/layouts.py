"""One run at every layout of a number of ranks: does it compute what one process does?

    python -m benchmarks.layouts CONFIG --ranks 8 --out FILE.json [--set KEY=VALUE ...]

Each layout, `parallel.dp` times `parallel.cp`, is an ordinary run under torchrun. Its losses and gradient norms (AdamW
hides from the losses a factor that all gradients have in common) must be those of one process in float64: the same in
float64, and in another dtype as close as rounding leaves them while a run is calm. Where losses jump, or gradients are
much clipped, rounding soon makes another curve of one process, too, and there is nothing to compare: take a lower
learning rate. Exit codes: 0 done, 1 a layout computes something else or a run failed, 2 something that the user can
correct.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.common import Record, environment, make_way, table, write_json
from lhcp import config_file
from lhcp.checks import check_data
from lhcp.config import ConfigError, RunConfig
from lhcp.distributed.env import ProcessEnv
from lhcp.launch import torchrun
from lhcp.metrics import read_metrics, tell

NAME = "layouts"
TOLERANCES = {
    "float64": {"losses": 1e-9, "grad_norms": 1e-9},
    "float32": {"losses": 1e-4, "grad_norms": 1e-3},
    "bfloat16": {"losses": 2**-8, "grad_norms": 2**-5},
}
"""Largest relative differences from float64. Of calm runs of 15 steps they were at most 4e-16 and 2e-16 in float64,
1.2e-3 and 2.6e-2 in bfloat16 (39M parameters, one H200 as two); and, of a small model on CPUs, one process as two, 2e-6
and 5e-5 in float32, 1.8e-3 and 1.8e-2 in bfloat16."""
HEADER = [
    *("dtype", "dp", "cp", "steps"),
    *("loss, first", "last", "error", "at most"),
    *("grad norm, last", "error", "at most"),
]
NOTE = "A run against one process in float64: the largest relative difference of a loss, and of a gradient norm."
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
    shapes = [(1, 1), *((ranks // cp, cp) for cp in range(1, ranks + 1) if ranks % cp == 0)]
    configs = [_at(path, overrides, dp, cp) for dp, cp in shapes]
    check_data(configs[0])
    make_way(out)
    dtype = configs[0].activation_dtype
    if dtype == "float64":
        shapes = shapes[1:]
    with tempfile.TemporaryDirectory(prefix="layouts-") as folder:
        exact = _curve(path, [*overrides, "dtype=float64", "compute_dtype=null"], 1, 1, Path(folder) / "exact")
        found = [_curve(path, overrides, dp, cp, Path(folder) / f"{dp}x{cp}") for dp, cp in shapes]
    result: Record = {
        "benchmark": NAME,
        "config": configs[0].model_dump(mode="json"),
        "environment": environment(ProcessEnv.read().device(configs[0].device), dtype) | {"ranks": ranks},
        "exact": exact,
        **judged(dtype, exact, shapes, found),
    }
    write_json(out, result)
    print(table(HEADER, rows(result)), end="")
    if problem := complaint(result):
        tell(problem)
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
        shapes: dp and cp of the runs.
        found: of these runs.

    Returns:
        `passed`, `tolerances`, and for each run `dp`, `cp`, its curve and its `errors`.
    """
    tolerances = TOLERANCES[dtype]
    runs: list[Record] = [
        {"dp": dp, "cp": cp, **curve, "errors": {name: _error(curve[name], exact[name]) for name in tolerances}}
        for (dp, cp), curve in zip(shapes, found, strict=True)
    ]
    passed = all(_close(run, tolerances) for run in runs)
    return {"passed": passed, "tolerances": tolerances, "runs": runs}


def _error(values: Sequence[float], exact: Sequence[float]) -> float:
    """The largest relative difference; not a number where a value is not."""
    return float(np.max([abs(a - b) / abs(b) for a, b in zip(values, exact, strict=True)]))


def complaint(result: Record) -> str | None:
    """What did not pass."""
    if result["passed"]:
        return None
    alone = result["runs"][0]
    if alone["dp"] * alone["cp"] == 1 and not _close(alone, result["tolerances"]):
        return "one process strays from its own curve in float64, so nothing can be compared; take a lower optim.lr"
    return "a layout does not compute what one process does"


def _close(run: Record, tolerances: Mapping[str, float]) -> bool:
    """Not where an error is not a number, which a file has as None."""
    errors = [math.nan if run["errors"][name] is None else run["errors"][name] for name in tolerances]
    return all(error <= most for error, most in zip(errors, tolerances.values(), strict=True))


def rows(result: Record) -> list[list[str]]:
    """Lines of the table under `HEADER`."""
    most = {name: f"{tolerance:.1e}" for name, tolerance in result["tolerances"].items()}
    return [
        [
            *(result["environment"]["dtype"], str(run["dp"]), str(run["cp"]), str(len(run["losses"]))),
            *(f"{run['losses'][0]:.4f}", f"{run['losses'][-1]:.4f}"),
            *(f"{run['errors']['losses']:.1e}", most["losses"]),
            f"{run['grad_norms'][-1]:.4f}",
            *(f"{run['errors']['grad_norms']:.1e}", most["grad_norms"]),
        ]
        for run in result["runs"]
    ]


if __name__ == "__main__":
    sys.exit(main())
