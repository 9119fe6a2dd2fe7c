"""What a job does next: `python -m lhcp.launch.verdict CONFIG OUTCOME`, asked by slurm/lib/train.sh. Imports no torch.

OUTCOME is `start`, or the exit code of the training that has ended. The answer, one line on stdout:

run         (again,) in these nodes
requeue     later, perhaps on other nodes
end CODE    no more; the reason is on stderr

A failure is tried again in place once and requeued from the second time on. Failures in a row after which no further
checkpoint was published make a crash loop, which ends at `checkpoint.max_failures`; so do stops without a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lhcp import config_file
from lhcp.checkpoint.folder import published
from lhcp.config import RunConfig
from lhcp.launch.jobs import is_cancelled
from lhcp.lock import holder
from lhcp.metrics import JsonLines
from lhcp.progress import read_steps
from lhcp.stop import EXIT_FORCED, EXIT_REFUSED, EXIT_STOPPED

FAILURES_FILE = "failures.jsonl"
"""In a run folder: one object a failure, or `{"submitted": TIME}` where somebody started the run again."""
_NOT_HERE = (EXIT_STOPPED, EXIT_FORCED, EXIT_REFUSED)
"""Codes after which there is no use in trying again in the same nodes."""
_LOCK_S, _LOOK_S = 180.0, 2.0
_EARLY = (128 + signal.SIGUSR1, 128 + signal.SIGTERM)
"""Of processes that were told to stop before they had begun to listen."""


def next_action(config: RunConfig, out: Path, outcome: str, job: Mapping[str, str]) -> str:
    """The answer; a failure is recorded in the run folder.

    Args:
        config: of the run.
        out: the output folder that the job belongs to; the run folder, or the one above.
        outcome: `start`, or an exit code.
        job: of the failure's record, such as the job's number and nodes.
    """
    if outcome == "start":
        return _before(config, out, job)
    code = EXIT_STOPPED if int(outcome) in _EARLY else int(outcome)
    if code in (0, EXIT_REFUSED) or is_cancelled(out):
        return f"end {code}"
    return _after_failure(config, out, code, job)


def _after_failure(config: RunConfig, out: Path, code: int, job: Mapping[str, str]) -> str:
    run_dir = config.output_dir
    failure = {"time": _now(), "code": code, "step": _reached(run_dir), "saved": _saved(run_dir), **job}
    record(run_dir, failure)
    failures = in_a_row(run_dir)
    if len(failures) >= config.checkpoint.max_failures:
        _tell(crash_loop(config, out, failures))
        return "end 1"
    return "run" if len(failures) == 1 and code not in _NOT_HERE else "requeue"


def _before(config: RunConfig, out: Path, job: Mapping[str, str]) -> str:
    run_dir = config.output_dir
    if _saved(run_dir) == config.total_steps:
        _tell(f"the run in {run_dir} is finished: {config.total_steps} steps")
        return "end 0"
    if is_cancelled(out):
        return f"end {EXIT_STOPPED}"
    failures = in_a_row(run_dir)
    if len(failures) >= config.checkpoint.max_failures:
        _tell(crash_loop(config, out, failures))
        return "end 1"
    if _wait_while_locked(run_dir):
        return "run"
    return _after_failure(config, out, EXIT_REFUSED, job)


def _wait_while_locked(run_dir: Path) -> bool:
    """Whether the run is free: file systems let go of the lock of a node that died only after a while."""
    deadline = time.monotonic() + _LOCK_S
    told = None
    while (held := holder(run_dir)) and time.monotonic() < deadline:
        if told is None:
            _tell(f"note: {run_dir} is in use by {held}; waiting up to {_LOCK_S:g} s for it to end")
        told = held
        time.sleep(_LOOK_S)
    return holder(run_dir) is None


def crash_loop(config: RunConfig, out: Path, failures: Sequence[Mapping[str, Any]]) -> str:
    """The message that ends one."""
    steps = sorted({failure["step"] + 1 for failure in failures})
    where = f"step {steps[0]}" if len(steps) == 1 else f"steps {', '.join(map(str, steps))}"
    codes = ", ".join(str(failure["code"]) for failure in failures)
    run_dir = config.output_dir
    if all(failure["code"] == EXIT_STOPPED for failure in failures):
        return (
            f"error: told to stop {len(failures)} times in a row before there was a new checkpoint: not started again\n"
            "       is the time limit too short for the start, or SIGUSR1 too early? with more time, go on by\n"
            "       lhcp submit CONFIG --resume --time ..."
        )
    logs = f" and in {run_dir / 'logs'}" if (run_dir / "logs").is_dir() else ""
    return (
        f"error: {where} of {config.total_steps} failed {len(failures)} times in a row, with no new checkpoint between "
        f"(exit codes {codes}): not started again\n"
        f"       what was wrong is said above{logs}; when it is mended, go on by lhcp submit {out},\n"
        f"       or, with another configuration or site file, by lhcp submit CONFIG --resume"
    )


def in_a_row(run_dir: Path) -> list[dict[str, Any]]:
    """The last failures, since a checkpoint was published or somebody started the run again.

    Being told to stop is no failure if a checkpoint came of it.
    """
    path = run_dir / FAILURES_FILE
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    row: list[dict[str, Any]] = []
    saved = 0
    for line in lines:
        try:
            failure = json.loads(line)
        except json.JSONDecodeError:  # the last, or torn by a full disk
            continue
        if "submitted" in failure:
            row = []
            continue
        if failure["saved"] > saved:
            row = []
        if failure["code"] != EXIT_STOPPED or failure["saved"] <= saved:
            row.append(failure)
        saved = failure["saved"]
    return row if _saved(run_dir) <= saved else []


def forgive(out: Path) -> None:
    """Begin to count anew, because somebody starts the run in `out`, or those in folders of it, again."""
    for path in (out / FAILURES_FILE, *out.glob(f"*/{FAILURES_FILE}")):
        if path.exists():
            record(path.parent, {"submitted": _now()})


def record(run_dir: Path, entry: Mapping[str, Any]) -> None:
    """Append to the failures of a run."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lines = JsonLines(run_dir / FAILURES_FILE)
    lines.append(dict(entry))
    lines.close()


def _saved(run_dir: Path) -> int:
    return max(published(run_dir), default=0)


def _reached(run_dir: Path) -> int:
    """The step, from 0, that was not ended."""
    steps, _ = read_steps(run_dir)
    return int(steps[-1]["step"]) + 1 if steps else 0


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the answer."""
    parser = argparse.ArgumentParser(prog="lhcp.launch.verdict")
    parser.add_argument("config", type=Path)
    parser.add_argument("outcome")
    args = parser.parse_args(argv)
    job = {key.lower(): os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST") if key in os.environ}
    config = config_file.load(args.config)
    print(next_action(config, Path(os.environ.get("LHCP_OUT", config.output_dir)), args.outcome, job))


if __name__ == "__main__":
    main()
