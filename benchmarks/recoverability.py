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
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.arms import (
    FIRST_DENSE,
    PASSKEY_FILE,
    against_dense,
    grouped,
    is_dense,
    less_dense,
    read_arm,
    same_machines,
    steady_hours,
    steady_hours_until,
)
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
from lhcp.checkpoint.folder import published
from lhcp.checks import check_files
from lhcp.config import ConfigError, RunConfig
from lhcp.config_file import CONFIG_FILE
from lhcp.eval.report import mean
from lhcp.launch import grid, torchrun
from lhcp.metrics import tell
from lhcp.stop import EXIT_FORCED, EXIT_STOPPED

NAME = "recoverability"
STOPPED = (EXIT_STOPPED, EXIT_FORCED, *(128 + number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)))
"""Exit codes of a run that somebody has stopped, rather than failed."""
HEADER = ["run", "stages", "before the switch", "largest before", "spike", "back after", "final train loss",
          "held-out loss", "wall time"]  # fmt: skip
SUMMARY = ["arm", "S / N", "runs", "held-out loss", "minus dense", "spike", "back after", "time at the median",
           "dense / it", "to that loss"]  # fmt: skip
NOTES = (
    "Losses in nats per token. Train losses: means over 20 steps, over a tenth of the stage where that is fewer.",
    f"Spike: largest loss of a single step among the first {FIRST_DENSE} dense ones, minus the loss before the switch. "
    f"Largest before: the same of the last {FIRST_DENSE} Lighthouse steps, so how far single steps stray anyway.",
    "Back after: from the peak on, dense steps until the train loss is at or below that before the switch.",
    "Wall time: of all steps, each counted once; without evaluations, saves and restarts.",
)
NO_MATTER = {"output_dir", "checkpoint", "hang_timeout_s", "profile"}
"""Keys that change nothing of what is compared."""
SUMMARY_NOTES = (
    "S / N: rows that attention sees, of those in the sequence. Held-out loss: of the dense model at the end.",
    "Minus dense: that of dense from scratch with the same seed, on the same tokens in the same order. In parentheses: "
    "the lowest and the highest of the runs.",
    "Time at the median: of all steps, each as long as the median of its stage, so without compilation. Dense / it: "
    "that of dense from scratch over it. To that loss: that of dense from scratch until its held-out loss, on a "
    "straight line between evaluations, was as low as the arm's in the end, over the arm's; - where it never was.",
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
    command.add_argument("grid", type=Path, metavar="GRID", help="YAML file: config, arms, vary")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the arms' run folders")
    command.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="arms by a shell pattern on their names, such as 'dense,*'; can be repeated",
    )
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
                         help="override a key of every arm")  # fmt: skip
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
        if code in STOPPED:
            done = number - 1
            print(f"stopped in arm {number} of {len(arms)}; {done} before it are done; the same command goes on, from "
                  f"the arm's last checkpoint", file=sys.stderr, flush=True)  # fmt: skip
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
            config = config.resolve(ranks)
            _check_unchanged(folder, config)
            check_files(config, "last")
        except ConfigError as error:
            raise ConfigError(f"{element.name}: {error}") from None
        arms.append(Arm(element.name, folder, settings, ranks, _is_done(folder, config)))
    return common, arms


def _check_unchanged(folder: Path, config: RunConfig) -> None:
    """Refuse a run folder of another configuration: its numbers would stand under this one's name."""
    if not (folder / CONFIG_FILE).exists():
        return
    was, now = (x.model_dump(mode="json") for x in (config_file.load(folder / CONFIG_FILE), config))
    changed = [key for key in now if key not in NO_MATTER and was[key] != now[key]]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{key} is now {json.dumps(now[key])}, but was {json.dumps(was[key])} for the run in {folder}; choose "
            f"another --out, or remove that folder"
        )


def _is_done(folder: Path, config: RunConfig) -> bool:
    """Whether nothing is left to do: a kill may have come between the last step and its evaluation or checkpoint."""
    if config.total_steps not in published(folder):
        return False
    with suppress(OSError, KeyError, TypeError, ValueError):
        return bool(read_arm(folder)["finished"])
    return False


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
            if lacks := _lacks(run_dir, arm):
                problems[name] = lacks
            else:
                problems.pop(name, None)
    text = show(arms, problems)
    write_text(folder / f"{NAME}.md", text)
    write_json(
        folder / f"{NAME}.json",
        {"benchmark": NAME, "arms": arms, "problems": problems, "environment": software()},
    )
    try:
        plot(arms, folder)
    except OSError as error:
        raise ConfigError(f"a picture cannot be written: {error}; choose another place") from None
    print(text, end="")
    return 1 if problems or not arms else 0


def _lacks(run_dir: Path, arm: Mapping[str, Any]) -> str | None:
    """What a run still lacks of what is reported."""
    if arm["steps"] < arm["total_steps"]:
        return f"unfinished: {arm['steps']:,} of {arm['total_steps']:,} steps"
    if not arm["finished"]:
        return "its evaluation after the last step is missing: start it again"
    if arm["eval_sequences"] and arm["held_out_loss"] is None:
        return "no finite held-out loss of the dense model"
    if (run_dir / PASSKEY_FILE).exists() and not arm["passkeys"]:
        return f"its {PASSKEY_FILE} is not of the dense model after its last step: evaluate it again"
    return None


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
    every = [arm for group in groups.values() for arm in group]
    return [_summary_row(name, group, every) for name, group in groups.items()]


def _summary_row(name: str, group: Sequence[Record], every: Sequence[Record]) -> list[str]:
    first = group[0]
    share = "1" if first["subsequence"] is None else f"{first['subsequence'] / first['seq_len']:.2f}"
    less = [] if is_dense(first) else less_dense(group, every)
    pairs = [(arm, dense) for arm, dense in against_dense(group, every) if same_machines(arm, dense)]
    faster = [steady_hours(dense) / steady_hours(arm) for arm, dense in pairs]
    sooner = [until / steady_hours(arm) for arm, dense in pairs if not is_dense(arm)
              and (until := steady_hours_until(dense, arm["held_out_loss"])) is not None]  # fmt: skip
    spikes = [arm["spike"] for arm in group if arm["spike"] is not None]
    backs = [arm["recovered_after"] for arm in group if arm["recovered_after"] is not None]
    all_back = spikes and len(backs) == len(group)
    return [
        name, share, str(len(group)), _range([arm["held_out_loss"] for arm in group], ".4f"), _range(less, "+.4f"),
        _range(spikes, "+.2f"), _range(backs, ",.0f") if all_back else "-", _time(fmean(map(steady_hours, group))),
        f"{fmean(faster):.2f}" if faster else "-", _range(sooner, ".2f") if len(sooner) == len(pairs) else "-",
    ]  # fmt: skip


def _range(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    middle = format(fmean(values), form)
    return middle if len(values) == 1 else f"{middle} ({format(min(values), form)} to {format(max(values), form)})"


def _time(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.2f} min"


def _passkeys(arms: Mapping[str, Record]) -> str:
    """Shares of passkeys found by each run, by context, over all depths."""
    found = {name: arm["passkeys"] for name, arm in arms.items() if arm["passkeys"]}
    if not found:
        return ""
    contexts = sorted({context for each in found.values() for row in each.values() for context in row})
    rows = []
    for name, each in found.items():
        by_context = [[row[context] for row in each.values() if context in row] for context in contexts]
        rows.append([name, *(f"{fmean(column):.0%}" if column else "-" for column in by_context), f"{mean(each):.0%}"])
    header = ["passkeys found, by context", *(f"{context:,}" for context in contexts), "mean"]
    note = "Of the prompts of all depths, answered by the dense model; chance is 10%.  \n"
    return f"{table(header, rows)}\n{note}"


def _row(name: str, arm: Mapping[str, Any]) -> list[str]:
    def shown(key: str, form: str) -> str:
        return "-" if arm[key] is None else format(arm[key], form)

    stages = ", ".join(f"{stage['steps']:,} {stage['mode']}" for stage in arm["stages"])
    losses = [shown("loss_before", ".4f"), shown("largest_before", "+.4f"), shown("spike", "+.4f"),
              shown("recovered_after", ",")]  # fmt: skip
    last = [shown("final_train_loss", ".4f"), shown("held_out_loss", ".4f"), _time(arm["hours"])]
    return [name, stages, *losses, *last]


if __name__ == "__main__":
    sys.exit(main())
