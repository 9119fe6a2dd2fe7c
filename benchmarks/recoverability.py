"""What the switch to dense attention costs a run, and what it ends with: a table over the arms of a grid.

    python -m benchmarks.recoverability report DIR [--expect NAMES_FILE]

DIR holds one run folder an arm, made by lhcp.train, finished or not. Exit codes: 0 all arms are there and finished,
1 one is not, 2 something that the user can correct.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

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
from lhcp.config import ConfigError, ParallelConfig, StageConfig
from lhcp.config_file import CONFIG_FILE, read_mapping
from lhcp.metrics import HELD_OUT, read_events, tell
from lhcp.progress import read_starts, read_steps

NAME = "recoverability"
FIRST_DENSE = 100
"""Steps after the switch among which the largest loss is looked for."""
HEADER = ["arm", "stages", "before the switch", "spike", "back after", "final train loss", "held-out loss", "hours"]
NOTES = (
    "Losses in nats per token. Train losses: means of the last 20 steps, of a tenth of a stage where it is shorter.",
    f"Spike: largest loss in the first {FIRST_DENSE} dense steps, less the loss before the switch.",
    "Back after: dense steps until such a mean is at or below the loss before the switch.",
    "Hours: wall time of all steps, each counted once; without evaluations, saves and restarts.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Report; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.recoverability", description="Compare runs that switch to dense.")
    command = parser.add_subparsers(required=True).add_parser("report", help="a table over the run folders in DIR")
    command.add_argument("folder", type=Path, metavar="DIR")
    command.add_argument("--expect", type=Path, metavar="NAMES_FILE", help="names of arms that must be there")
    args = parser.parse_args(argv)
    try:
        return report(args.folder, read_names(args.expect))
    except ConfigError as error:
        tell(error)
        return 2


def report(folder: Path, expected: Sequence[str]) -> int:
    """Write `recoverability.md` and `.json` in `folder` and print the first; 1 when an arm is missing or unfinished.

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
    rows = table(HEADER, [_row(name, arm) for name, arm in arms.items()])
    text = document("Recoverability: from Lighthouse to dense attention", rows, NOTES, problems)
    write_text(folder / f"{NAME}.md", text)
    write_json(
        folder / f"{NAME}.json",
        {"benchmark": NAME, "arms": arms, "problems": problems, "environment": software()},
    )
    print(text, end="")
    return 1 if problems or not arms else 0


def read_arm(run_dir: Path) -> Record:
    """The numbers of one run; None where there is none, or not yet.

    Raises:
        FileNotFoundError: it has logged nothing.
        ConfigError, OSError, KeyError, TypeError, ValueError: a file is damaged.
    """
    config = read_mapping(run_dir / CONFIG_FILE)
    stages = [StageConfig.model_validate(stage) for stage in config["stages"]]
    parallel = ParallelConfig.model_validate(config["parallel"])
    starts, (steps, _) = read_starts(run_dir), read_steps(run_dir)
    if not steps:
        raise FileNotFoundError(run_dir)
    done, total = steps[-1]["step"] + 1, sum(stage.steps for stage in stages)
    losses = {record["step"]: record["loss"] for record in steps if record["loss"] is not None}
    return {
        "stages": [stage.model_dump() for stage in stages],
        "steps": done,
        "total_steps": total,
        "finished": done >= total,
        **_at_switch(stages, losses, done),
        "final_train_loss": _mean(losses, total, _window(stages[-1])) if done >= total else None,
        "held_out_loss": _held_out(run_dir, done),
        "hours": sum(record["step_s"] for record in steps) / 3600,
        "ranks": (parallel.dp or 1) * parallel.cp,
        "environment": starts[-1] if starts else None,
    }


def _at_switch(stages: Sequence[StageConfig], losses: Mapping[int, float], done: int) -> Record:
    """`loss_before`, `spike` and `recovered_after` of the last switch from Lighthouse to dense.

    Args:
        stages: of the run.
        losses: by step, finite ones.
        done: steps done.
    """
    values: Record = {"loss_before": None, "spike": None, "recovered_after": None}
    starts = [0, *accumulate(stage.steps for stage in stages)]
    switches = [i for i, (one, two) in enumerate(pairwise(stages)) if (one.mode, two.mode) == ("lighthouse", "dense")]
    if not switches or done < (first := starts[switches[-1] + 1]):
        return values
    sparse, dense = stages[switches[-1]], stages[switches[-1] + 1]
    stop = min(first + dense.steps, done)
    before = values["loss_before"] = _mean(losses, first, _window(sparse))
    start = {step: losses[step] for step in range(first, min(first + FIRST_DENSE, stop)) if step in losses}
    if before is None or not start:
        return values
    peak = max(start, key=start.__getitem__)
    values["spike"] = start[peak] - before
    values["recovered_after"] = 0 if values["spike"] <= 0 else _back(losses, first, range(peak, stop), dense, before)
    return values


def _back(losses: Mapping[int, float], first: int, steps: range, stage: StageConfig, before: float) -> int | None:
    """Steps from `first`, the first of `stage`, until among `steps` the mean loss is at or below `before`."""
    for step in steps:
        mean = _mean(losses, step + 1, min(_window(stage), step + 1 - first))
        if mean is not None and mean <= before:
            return step + 1 - first
    return None


def _window(stage: StageConfig) -> int:
    """Steps of a stage that a loss is the mean of."""
    return min(20, max(1, stage.steps // 10))


def _mean(losses: Mapping[int, float], stop: int, window: int) -> float | None:
    """Of the `window` steps before `stop`; None where none of them was finite."""
    found = [losses[step] for step in range(stop - window, stop) if step in losses]
    return fmean(found) if found else None


def _held_out(run_dir: Path, done: int) -> float | None:
    """The last held-out loss of the dense model."""
    events: list[Record] = []
    with suppress(FileNotFoundError):
        events = read_events(run_dir)
    losses = [event["loss"] for event in events if event["event"] == HELD_OUT and event["step"] < done]
    return losses[-1] if losses else None


def _row(name: str, arm: Mapping[str, Any]) -> list[str]:
    def shown(key: str, form: str) -> str:
        return "-" if arm[key] is None else format(arm[key], form)

    stages = ", ".join(f"{stage['steps']:,} {stage['mode']}" for stage in arm["stages"])
    losses = [shown("loss_before", ".4f"), shown("spike", "+.4f"), shown("recovered_after", ",")]
    last = [shown("final_train_loss", ".4f"), shown("held_out_loss", ".4f"), shown("hours", ",.2f")]
    return [name, stages, *losses, *last]


if __name__ == "__main__":
    sys.exit(main())
