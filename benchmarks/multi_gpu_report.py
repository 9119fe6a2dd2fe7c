"""The report of `benchmarks/multi_gpu.sh`: exactness and cost of context parallelism over the GPUs of a node.

    python -m benchmarks.multi_gpu_report DIR

writes DIR/multi_gpu.md from what DIR holds of the rows that DIR/rows.txt names. Exit codes: 0 done, 1 a result is
wrong or damaged, 2 something that the user can correct.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import layouts, scaling_report, train_step, train_step_report
from benchmarks.common import NO_RESULT, Record, check_folder, document, read_names, setting, table, write_text
from lhcp.config import ConfigError
from lhcp.metrics import tell

ROWS, REPORT = "rows.txt", "multi_gpu.md"
NOT_YET = "not measured yet"
TRAINED = ["N", "dp", "cp", *train_step.HEADER, "transfers, exposed, by rank"]
Results = Mapping[str, Record]


def main(argv: Sequence[str] | None = None) -> int:
    """Read and write; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.multi_gpu_report", description="Merge multi_gpu.sh's results.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args(argv).folder
    try:
        return report(folder)
    except ConfigError as error:
        tell(error)
        return 2


def report(folder: Path) -> int:
    """Merge the results in `folder` into its `REPORT` and print that; 1 when one is wrong or damaged.

    Raises:
        ConfigError: no such folder, no list of rows in it, or it cannot be written to.
    """
    check_folder(folder)
    if not (folder / ROWS).exists():
        raise ConfigError(f"{folder} has no {ROWS}; name a folder of benchmarks/multi_gpu.sh")
    problems = dict.fromkeys(read_names(folder / ROWS), NO_RESULT)
    scaling = _scaling(folder, problems)
    curves = _read(folder, "layouts", problems, layouts.rows)
    steps = _read(folder, "train", problems, _trained)
    problems = {name: _said(folder, name, what) for name, what in problems.items()}
    parts = [
        "\n".join(f"- {line}" for line in summary(scaling, curves, steps)) + "\n",
        "## One layer\n",
        scaling_report.tables(scaling),
        "## A run, by layout\n",
        table(layouts.HEADER, [line for result in curves.values() for line in layouts.rows(result)]),
        f"{layouts.NOTE}\n",
        "## Whole training steps\n",
        table(TRAINED, [line for result in steps.values() for line in _trained(result)]),
        "\n".join(f"{note}  " for note in train_step_report.NOTES) + "\n",
    ]
    environments = {
        f"{kind}/{name}": result["environment"]
        for kind, results in (("scaling", scaling), ("layouts", curves), ("train", steps))
        for name, result in results.items()
    }
    notes = [
        *scaling_report.NOTES,
        *sorted({line for found in environments.values() for line in (setting(found), _nccl(found))}),
        *_other_code(environments),
    ]
    if any("nccl" not in found["versions"] for found in environments.values()):
        parts.insert(0, "Some rows are of CPU processes, which share cores: their times say nothing.\n")
    text = document("Several GPUs", "\n".join(parts), notes, problems)
    write_text(folder / REPORT, text)
    print(text, end="")
    return 1 if set(problems.values()) - {NOT_YET} else 0


def _names(kind: str, rows: Iterable[str]) -> list[str]:
    return [row.removeprefix(f"{kind}/") for row in rows if row.startswith(f"{kind}/")]


def _said(folder: Path, name: str, what: str) -> str:
    """What is wrong with a row, and what to do."""
    log = folder / "failed" / f"{name.replace('/', '-')}.log"
    if what == NO_RESULT:
        return f"failed: see {log.relative_to(folder)}" if log.exists() else NOT_YET
    return f"{what}; remove it to measure again" if "damaged" in what else what


def _scaling(folder: Path, problems: dict[str, str]) -> dict[str, Record]:
    """As `_read`, of `benchmarks.scaling`."""
    names = _names("scaling", problems)
    results, wrong, _ = scaling_report.read(folder / "scaling", names)
    for name in names:
        del problems[f"scaling/{name}"]
        if name in wrong:
            problems[f"scaling/{name}"] = wrong[name]
    return {name: results[name] for name in names if name in results}


def _read(
    folder: Path, kind: str, problems: dict[str, str], rows: Callable[[Record], list[list[str]]]
) -> dict[str, Record]:
    """Results of one kind, by name; of those that are wrong or damaged, why, in `problems`."""
    results: dict[str, Record] = {}
    for name in _names(kind, list(problems)):
        path = folder / kind / f"{name}.json"
        if not path.exists():
            continue
        try:
            result = json.loads(path.read_bytes())
            if not result.get("check", result)["passed"]:
                what = layouts.complaint(result) if kind == "layouts" else "not what one process computes"
                problems[f"{kind}/{name}"] = f"{path.name}: {what}"
                continue
            rows(result)
            setting(result["environment"])
            results[name] = result
            del problems[f"{kind}/{name}"]
        except (OSError, AttributeError, LookupError, TypeError, ValueError, ZeroDivisionError) as error:
            problems[f"{kind}/{name}"] = f"{path.name} is damaged ({type(error).__name__}: {error})"
    return results


def _trained(result: Record) -> list[list[str]]:
    config = result["config"]
    where = [f"{config['seq_len']:,}", str(config["parallel"]["dp"]), str(config["parallel"]["cp"])]
    return [[*where, *train_step.row(mode, found), _exposed(found)] for mode, found in result["modes"].items()]


def _exposed(found: Record) -> str:
    """Of each rank, milliseconds of a step in which its GPU does nothing but NCCL's transfers, or waits in them."""
    return " / ".join(f"{rank['transfers_ms']['exposed']:,.0f}" for rank in found.get("by_rank", [])) or "-"


def _other_code(environments: Results) -> list[str]:
    """Which rows are of another version than most are, and so of another day, and maybe of another machine."""
    codes = Counter(found.get("code") for found in environments.values())
    others = [name for name, found in environments.items() if found.get("code") != codes.most_common(1)[0][0]]
    return [f"Of another version of the code than the rest: {', '.join(others)}."] if others else []


def _nccl(environment: Record) -> str:
    settings = " ".join(f"{key}={value}" for key, value in environment.get("nccl_settings", {}).items())
    return f"In the environment: {settings}." if settings else "No NCCL settings in the environment."


def summary(scaling: Results, curves: Results, steps: Results) -> Iterator[str]:
    """What the rows together say, a line each; nothing of what was not measured."""
    ratios: dict[tuple[str, int], float] = {}
    for result in scaling.values():
        check, key = result["check"], (result["config"]["dtype"], result["config"]["cp"])
        of_result = [check["errors"][name] / error for name, error in check.get("alone", {}).items() if error]
        if of_result and not result["emulated"]:
            ratios[key] = max(ratios.get(key, 0.0), *of_result)
    for (dtype, cp), ratio in sorted(ratios.items()):
        yield f"One layer in {dtype} over {cp} ranks: errors at most {ratio:.2f} times those of one process."
    for result in curves.values():
        of_several = [run["errors"] for run in result["runs"] if run["dp"] * run["cp"] > 1]
        losses, norms = (max(errors[name] for errors in of_several) for name in ("losses", "grad_norms"))
        yield (
            f"Runs in {result['environment']['dtype']} at every layout of {result['environment']['ranks']} ranks, "
            f"against one process in float64: losses within {losses:.1e}, gradient norms within {norms:.1e}."
        )
    for result in _measured(scaling):
        config, both = result["config"], "forward_backward"
        over = scaling_report.overhead(result, "ring", "lighthouse")[both]
        exposed = result["exchanges"]["ring"]["lighthouse"]["exposed_ms"][both]
        share = result["one_device"]["lighthouse"][both] / config["cp"]
        yield (
            f"A Lighthouse layer of {config['seq_len']:,} tokens over {config['cp']} ranks by ring, forward and "
            f"backward: {over:.1f}% above a share of one device's time, of which transfers "
            f"and the host add {100 * exposed / share:.1f} points to what it computes alone."
        )
    whole = {
        (result["config"]["parallel"]["dp"], result["config"]["parallel"]["cp"]): result["modes"]["lighthouse"]
        for result in steps.values()
    }
    for dp, cp in sorted(whole):
        if cp > 1:
            mine, apart = whole[dp, cp], whole.get((dp * cp, 1))
            speed, against = mine["tokens_per_s_per_gpu"], ""
            if apart:
                against = (
                    f", {100 * (apart['tokens_per_s_per_gpu'] / speed - 1):.1f}% more time a token than with one each"
                )
                if apart["memory"] != mine["memory"]:
                    against += ", which recompute otherwise"
            yield f"Whole Lighthouse steps on {dp * cp} GPUs, {cp} a sequence: {speed:,.0f} tokens/s/GPU{against}."


def _measured(scaling: Results) -> list[Record]:
    """Timed over ranks, by ring, the longest first."""
    found = [
        result
        for result in scaling.values()
        if not result["emulated"] and result["config"]["cp"] > 1 and "ring" in result.get("exchanges", {})
    ]
    return sorted(found, key=lambda result: (-result["config"]["seq_len"], result["config"]["cp"]))


if __name__ == "__main__":
    sys.exit(main())
