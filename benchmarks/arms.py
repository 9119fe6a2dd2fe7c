"""The runs of a grid, its arms, as `benchmarks.recoverability` compares them: read from their folders."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.common import Record
from lhcp.config import EvalConfig, LighthouseConfig, ParallelConfig, StageConfig
from lhcp.config_file import CONFIG_FILE, read_mapping
from lhcp.eval.report import Shares, shares
from lhcp.metrics import HELD_OUT, read_events
from lhcp.progress import read_starts, read_steps

FIRST_DENSE = 100
"""Steps after the switch among which the largest loss is looked for."""
POINTS = 2_000
"""Of a loss curve in a result, at most."""
PASSKEY_FILE = "passkey.json"
"""In a run folder, where `lhcp eval passkey RUN --out RUN` has left it."""


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
    evaluation = EvalConfig.model_validate(config.get("eval") or {})
    held_out = _held_out(run_dir, done)
    last = {event["mode"]: event["loss"] for event in held_out if event["steps"] == total}
    evaluated = not evaluation.sequences or set(evaluation.modes) <= last.keys()
    return {
        "stages": [stage.model_dump() for stage in stages],
        "seed": config.get("seed", 0),
        "global_batch_size": config.get("global_batch_size"),
        "data": str((config.get("data") or {}).get("path")),
        "eval_sequences": evaluation.sequences,
        **_attention(config, stages),
        "tokens": steps[-1]["tokens"],
        "steps": done,
        "total_steps": total,
        "finished": done >= total and evaluated,
        **(switch := at_switch(stages, losses, done)),
        "after_switch": _after_switch(switch["switch"], losses, done),
        "final_train_loss": mean_loss(losses, total, _window(stages[-1])) if done >= total else None,
        "held_out_loss": last.get("dense"),
        "held_out": held_out,
        "hours": sum(record["step_s"] for record in steps) / 3600,
        "seconds_per_step": _step_times(stages, steps),
        "ranks": (parallel.dp or 1) * parallel.cp,
        "curve": _curve(losses, done),
        "passkeys": _passkeys(run_dir, done),
        "environment": starts[-1] if starts else None,
    }


def without_seed(name: str) -> str:
    """The name of an arm, the same for all its seeds."""
    return re.sub(r"(^|,)seed=\d+", "", name).strip(",") or "run"


def _attention(config: Mapping[str, Any], stages: Sequence[StageConfig]) -> Record:
    """`attention` and S of a run that selects; None of a dense one."""
    if "lighthouse" not in {stage.mode for stage in stages} or "attention" not in config:
        return {"attention": None, "dense_layers": [], "seq_len": config.get("seq_len"), "subsequence": None}
    attention = LighthouseConfig.model_validate(config["attention"])
    seq_len = config["seq_len"]
    return {
        "attention": attention.model_dump(),
        "dense_layers": config.get("dense_layers", []),
        "seq_len": seq_len,
        "subsequence": attention.subsequence_length(attention.padded_length(seq_len)),
    }


def at_switch(stages: Sequence[StageConfig], losses: Mapping[int, float], done: int) -> Record:
    """The last switch from Lighthouse to dense: its step, and what happened to the loss there.

    `largest_before` is to the steps before the switch what `spike` is to those after it: how far single steps stray.

    Args:
        stages: of the run.
        losses: by step, finite ones.
        done: steps done.
    """
    values: Record = {"switch": None, "loss_before": None, "spike": None, "largest_before": None,
                      "recovered_after": None}  # fmt: skip
    starts = [0, *accumulate(stage.steps for stage in stages)]
    switches = [i for i, (one, two) in enumerate(pairwise(stages)) if (one.mode, two.mode) == ("lighthouse", "dense")]
    if not switches or done < (first := starts[switches[-1] + 1]):
        return values
    sparse, dense = stages[switches[-1]], stages[switches[-1] + 1]
    stop = min(first + dense.steps, done)
    values["switch"] = first
    before = values["loss_before"] = mean_loss(losses, first, _window(sparse))
    start = {step: losses[step] for step in range(first, min(first + FIRST_DENSE, stop)) if step in losses}
    if before is None or not start:
        return values
    late = range(first - max(_window(sparse), min(FIRST_DENSE, sparse.steps // 2)), first)
    values["largest_before"] = max(losses[step] for step in late if step in losses) - before
    peak = max(start, key=start.__getitem__)
    values["spike"] = start[peak] - before
    values["recovered_after"] = 0 if values["spike"] <= 0 else _back(losses, first, range(peak, stop), dense, before)
    return values


def _back(losses: Mapping[int, float], first: int, steps: range, stage: StageConfig, before: float) -> int | None:
    """Steps from `first`, the first of `stage`, until among `steps` the mean loss is at or below `before`."""
    for step in steps:
        mean = mean_loss(losses, step + 1, min(_window(stage), step + 1 - first))
        if mean is not None and mean <= before:
            return step + 1 - first
    return None


def _window(stage: StageConfig) -> int:
    """Steps of a stage that a loss is the mean of."""
    return min(20, max(1, stage.steps // 10))


def mean_loss(losses: Mapping[int, float], stop: int, window: int) -> float | None:
    """Of the `window` steps before `stop`; None where none of them was finite."""
    found = [losses[step] for step in range(stop - window, stop) if step in losses]
    return fmean(found) if found else None


def _held_out(run_dir: Path, done: int) -> list[Record]:
    """Held-out losses: after how many steps, in which mode."""
    events: list[Record] = []
    with suppress(FileNotFoundError):
        events = read_events(run_dir)
    return [
        {
            "steps": event["step"] + 1,
            "mode": event["event"][len(HELD_OUT) :].strip("_") or "dense",
            "loss": event["loss"],
        }
        for event in events
        if event["event"].startswith(HELD_OUT) and event["step"] < done
    ]


def _step_times(stages: Sequence[StageConfig], steps: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Median seconds of a step, by stage: what compiling, reading and saving add now and then is not in it."""
    ends = list(accumulate(stage.steps for stage in stages))
    times: list[float | None] = []
    for start, stop in pairwise([0, *ends]):
        mine = [record["step_s"] for record in steps if start <= record["step"] < stop]
        times.append(median(mine) if mine else None)
    return times


def steady_hours(arm: Mapping[str, Any]) -> float:
    """Hours of all steps done, each at its stage's median."""
    left, seconds = arm["steps"], 0.0
    for stage, each in zip(arm["stages"], arm["seconds_per_step"], strict=True):
        count = min(left, stage["steps"])
        seconds += count * (each or 0.0)
        left -= count
    return seconds / 3600


def _curve(losses: Mapping[int, float], done: int) -> Record:
    """The loss curve: means over `every` steps, None where none was finite."""
    every = math.ceil(done / POINTS)
    means = [mean_loss(losses, min(start + every, done), min(every, done - start)) for start in range(0, done, every)]
    return {"every": every, "loss": [None if mean is None else round(mean, 5) for mean in means]}


def _after_switch(first: int | None, losses: Mapping[int, float], done: int) -> list[float | None]:
    """Step by step, where the spike is."""
    steps = range(0) if first is None else range(first, min(first + 2 * FIRST_DENSE, done))
    return [round(losses[step], 5) if step in losses else None for step in steps]


def _passkeys(run_dir: Path, done: int) -> Shares | None:
    """What the dense model found, of the checkpoint after the last step; None of any other, or of a damaged file."""
    try:
        result = json.loads((run_dir / PASSKEY_FILE).read_text(encoding="utf-8"))
        if result["task"] != "passkey" or result["step"] != done:
            return None
        return shares(row for row in result["rows"] if row["mode"] == "dense") or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def grouped(arms: Mapping[str, Record]) -> dict[str, list[Record]]:
    """Finished arms with a held-out loss, the seeds of each together."""
    groups: dict[str, list[Record]] = {}
    for name, arm in arms.items():
        if arm["finished"] and arm["held_out_loss"] is not None:
            groups.setdefault(without_seed(name), []).append(arm)
    return groups


def is_dense(arm: Mapping[str, Any]) -> bool:
    """Whether a run was dense from scratch."""
    return {stage["mode"] for stage in arm["stages"]} == {"dense"}


def is_reference(arm: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a run is dense, and another's measure: of the same seed, on the same tokens in the same order."""
    keys = ("seed", "seq_len", "global_batch_size", "total_steps", "data", "eval_sequences")
    return is_dense(arm) and all(arm[key] == other[key] for key in keys)


def against_dense(group: Iterable[Record], arms: Iterable[Record]) -> list[tuple[Record, Record]]:
    """The runs of a group for which there is one reference among the arms, each with it."""
    pairs = [(arm, [other for other in arms if is_reference(other, arm)]) for arm in group]
    return [(arm, found[0]) for arm, found in pairs if len(found) == 1]


def same_machines(arm: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the times of two runs can be compared: as many devices, of the same name (if both know theirs)."""
    ranks, devices = zip(*((x["ranks"], (x["environment"] or {}).get("device")) for x in (arm, other)), strict=True)
    return ranks[0] == ranks[1] and (None in devices or devices[0] == devices[1])


def steady_hours_until(arm: Mapping[str, Any], loss: float) -> float | None:
    """Hours until the held-out loss of a run of one stage was as low as `loss`, every step at the median.

    On a straight line between evaluations of the dense model; None where it was never between two of them.
    """
    points = [(event["steps"], event["loss"]) for event in arm["held_out"] if event["mode"] == "dense"]
    for (one, high), (two, low) in pairwise(points):
        if high > loss >= low:
            steps = one + (two - one) * (high - loss) / (high - low)
            return float(steps / arm["steps"]) * steady_hours(arm)
    return None


def less_dense(group: Iterable[Record], arms: Iterable[Record]) -> list[float]:
    """Held-out losses less those of their references."""
    return [arm["held_out_loss"] - dense["held_out_loss"] for arm, dense in against_dense(group, list(arms))]
