"""Does a run that trains sparsely and ends densely get as good as one that is dense from scratch?

    python -m benchmarks.recoverability run GRID --out DIR [--only PATTERN ...] [--set KEY=VALUE ...]
    python -m benchmarks.recoverability report DIR [--expect NAMES_FILE]

`run` trains the arms of a grid (`launch/grid.py`) one after the other on this machine, each in its run folder DIR/ARM,
and reports; called again, it goes on where it was: arms that are done stay as they are. On a cluster, `lhcp launch
sbatch recoverability GRID --out DIR` runs the same arms as a job array. `report` compares what is there, finished or
not, passkeys too where `lhcp eval passkey DIR/ARM --out DIR/ARM` was called. Exit codes: 0 all arms are there and
finished, 1 one is not, 2 something that the user can correct, 75 told to stop.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.arms import FIRST_DENSE, grouped, is_dense, paired, read_arm, steady_hours
from benchmarks.common import (
    NO_RESULT,
    Record,
    check_folder,
    document,
    read_names,
    software,
    table,
    write_json,
    write_text,
)
from benchmarks.recoverability_plot import plot
from lhcp import config_file
from lhcp.checks import check_files
from lhcp.config import ConfigError
from lhcp.config_file import CONFIG_FILE
from lhcp.eval.report import mean, shares
from lhcp.launch import grid, torchrun
from lhcp.metrics import tell
from lhcp.progress import read_steps
from lhcp.stop import EXIT_STOPPED

NAME = "recoverability"
HEADER = ["arm", "stages", "before the switch", "spike", "back after", "final train loss", "held-out loss", "time"]
SUMMARY = ["arm", "S / N", "runs", "held-out loss", "less dense", "spike", "back after", "time", "dense / it"]
NOTES = (
    "Losses in nats per token. Train losses: means of the last 20 steps, of a tenth of a stage where it is shorter.",
    f"Spike: largest loss in the first {FIRST_DENSE} dense steps, less the loss before the switch.",
    "Back after: dense steps until such a mean is at or below the loss before the switch.",
    "Time: wall time of all steps, each counted once; without evaluations, saves and restarts.",
)
SUMMARY_NOTES = (
    "Held-out loss: of the dense model at the end; mean over seeds, and from the lowest to the highest.",
    "Less dense: the same less that of dense from scratch with the same seed, so on the same tokens in the same order.",
    "Time: of all steps at the median of their stage, so without compilation. Dense / it: how many times less.",
)


@dataclass(frozen=True)
class Arm:
    """One run of a grid, ready to start."""

    name: str
    folder: Path
    overrides: list[str]
    ranks: int
    done: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Run or report; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.recoverability", description="Compare runs that switch to dense.")
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("run", help="train the arms of a grid on this machine, and report")
    command.add_argument("grid", type=Path, metavar="GRID")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the arms' run folders")
    command.add_argument("--only", action="append", default=[], metavar="PATTERN", help="arms, such as 'dense,*'")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    command = commands.add_parser("report", help="a table over the run folders in DIR")
    command.add_argument("folder", type=Path, metavar="DIR")
    command.add_argument("--expect", type=Path, metavar="NAMES_FILE", help="names of arms that must be there")
    args = parser.parse_args(argv)
    try:
        if args.command == "run":
            return run(args.grid, args.out, args.only, args.overrides)
        return report(args.folder, read_names(args.expect))
    except ConfigError as error:
        tell(error)
        return 2


def run(path: Path, out: Path, only: Sequence[str], overrides: Sequence[str]) -> int:
    """Train the arms that are not done, one after the other, and report; see the module for the exit code.

    Args:
        path: a grid.
        out: folder for the run folders.
        only: patterns of names; none: all arms.
        overrides: KEY=VALUE, on top of each arm's.

    Raises:
        ConfigError: any arm's configuration or data is wrong; nothing has been started.
    """
    common, arms = plan(path, out, only, overrides)
    for number, arm in enumerate(arms, start=1):
        print(f"arm {number} of {len(arms)}: {arm.name}{', done' if arm.done else ''}", flush=True)
        if arm.done:
            continue
        code = torchrun.run(common, arm.overrides, arm.ranks, ["--resume", "last"])
        if code in (EXIT_STOPPED, 130):
            return code
        if code:
            print(f"{arm.name} ended with {code}; see {arm.folder}/logs", file=sys.stderr, flush=True)
    return report(out, [arm.name for arm in arms])


def plan(path: Path, out: Path, only: Sequence[str], overrides: Sequence[str]) -> tuple[Path, list[Arm]]:
    """Check all arms of a grid before one starts: their common configuration, and what is to be done for each.

    Raises:
        ConfigError: see `run`.
    """
    common, elements = grid.load(path)
    chosen = [e for e in elements if not only or any(fnmatchcase(e.name, pattern) for pattern in only)]
    if not chosen:
        names = ", ".join(element.name for element in elements)
        raise ConfigError(f"--only {' '.join(only)}: no such arm in {path}; it has {names}")
    arms = []
    for element in chosen:
        folder = out / element.name
        settings = [*element.overrides, *overrides, f"output_dir={json.dumps(str(folder))}"]
        try:
            config = config_file.load(common, settings)
            ranks = (config.parallel.dp or 1) * config.parallel.cp
            check_files(config.resolve(ranks), "last")
        except ConfigError as error:
            raise ConfigError(f"{element.name}: {error}") from None
        steps, _ = read_steps(folder)
        arms.append(Arm(element.name, folder, settings, ranks, len(steps) >= config.total_steps))
    return common, arms


def report(folder: Path, expected: Sequence[str]) -> int:
    """Write `recoverability.md`, `.json` and `.png` in `folder` and print the first; 1 when an arm is unfinished.

    Raises:
        ConfigError: no such folder, or it cannot be written to.
    """
    check_folder(folder)
    arms: dict[str, Record] = {}
    problems = dict.fromkeys(expected, NO_RESULT)
    for run_dir in sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}")):
        name = run_dir.name
        try:
            arms[name] = arm = read_arm(run_dir)
        except FileNotFoundError:
            problems[name] = "no step was logged: see its log"
        except (OSError, KeyError, TypeError, ValueError) as error:
            problems[name] = f"{run_dir} cannot be read ({type(error).__name__}: {error})"
        else:
            if arm["finished"]:
                problems.pop(name, None)
            else:
                problems[name] = f"unfinished: {arm['steps']:,} of {arm['total_steps']:,} steps"
    text = show(arms, problems)
    write_text(folder / f"{NAME}.md", text)
    write_json(
        folder / f"{NAME}.json",
        {"benchmark": NAME, "arms": arms, "problems": problems, "environment": software()},
    )
    plot(arms, folder)
    print(text, end="")
    return 1 if problems or not arms else 0


def show(arms: Mapping[str, Record], problems: Mapping[str, str]) -> str:
    """The report: arms summed up over seeds, passkeys where there are any, and each run."""
    parts = [table(HEADER, [_row(name, arm) for name, arm in arms.items()])]
    notes = list(NOTES)
    if groups := grouped(arms):
        parts.insert(0, "\n".join([table(SUMMARY, _summary(groups)), *(f"{n}  " for n in SUMMARY_NOTES), ""]))
    if keys := _passkeys(arms):
        parts.insert(1, keys)
    return document("Recoverability: from Lighthouse to dense attention", "\n".join(parts), notes, problems)


def _summary(groups: Mapping[str, Sequence[Record]]) -> list[list[str]]:
    reference = [arm for group in groups.values() for arm in group if is_dense(arm)]
    dense_hours = fmean(map(steady_hours, reference)) if reference else None
    return [_summary_row(name, group, reference, dense_hours) for name, group in groups.items()]


def _summary_row(
    name: str, group: Sequence[Record], reference: Sequence[Record], dense_hours: float | None
) -> list[str]:
    first = group[0]
    share = "1" if first["subsequence"] is None else f"{first['subsequence'] / first['seq_len']:.2f}"
    hours = fmean(map(steady_hours, group))
    less = [] if is_dense(first) else paired(group, reference)
    spikes = [arm["spike"] for arm in group if arm["spike"] is not None]
    backs = [arm["recovered_after"] for arm in group if arm["recovered_after"] is not None]
    back = f"{fmean(backs):,.0f}" if len(backs) == len(group) else "-"
    return [
        name, share, str(len(group)), _range([arm["held_out_loss"] for arm in group], ".4f"), _range(less, "+.4f"),
        _range(spikes, "+.2f"), back, _time(hours), f"{dense_hours / hours:.2f}" if dense_hours and hours else "-",
    ]  # fmt: skip


def _time(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.2f} min"


def _range(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    middle = format(fmean(values), form)
    return middle if len(values) == 1 else f"{middle} ({format(min(values), form)} to {format(max(values), form)})"


def _passkeys(arms: Mapping[str, Record]) -> str:
    """Shares of passkeys found by each arm, by context, over all depths."""
    found = {name: shares(r for r in arm["passkeys"]["rows"] if r["mode"] == "dense")
             for name, arm in arms.items() if arm["passkeys"]}  # fmt: skip
    if not found:
        return ""
    contexts = sorted({context for each in found.values() for row in each.values() for context in row})
    rows = []
    for name, each in found.items():
        by_context = [[row[context] for row in each.values() if context in row] for context in contexts]
        rows.append([name, *(f"{fmean(column):.0%}" if column else "-" for column in by_context), f"{mean(each):.0%}"])
    header = ["passkeys found, context", *(f"{context:,}" for context in contexts), "mean"]
    return table(header, rows)


def _row(name: str, arm: Mapping[str, Any]) -> list[str]:
    def shown(key: str, form: str) -> str:
        return "-" if arm[key] is None else format(arm[key], form)

    stages = ", ".join(f"{stage['steps']:,} {stage['mode']}" for stage in arm["stages"])
    losses = [shown("loss_before", ".4f"), shown("spike", "+.4f"), shown("recovered_after", ",")]
    last = [shown("final_train_loss", ".4f"), shown("held_out_loss", ".4f"), _time(arm["hours"])]
    return [name, stages, *losses, *last]


if __name__ == "__main__":
    sys.exit(main())
