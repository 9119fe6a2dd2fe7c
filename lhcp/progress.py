"""How far a run has come, as its folder tells. Imports no torch."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from lhcp.metrics import METRICS_FILE, STARTS_FILE, read_metrics

Record = dict[str, Any]


def read_starts(run_dir: Path) -> list[Record]:
    """One object for each start; none of a run that began before they were recorded."""
    starts = []
    with suppress(FileNotFoundError):
        for line in (run_dir / STARTS_FILE).read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):  # torn by a kill
                starts.append(json.loads(line))
    return starts


def read_steps(run_dir: Path) -> tuple[list[Record], float]:
    """The metrics of the steps done, and when the last of them was logged, in seconds since the epoch."""
    try:
        steps = read_metrics(run_dir)
        logged = (run_dir / METRICS_FILE).stat().st_mtime
    except FileNotFoundError:
        return [], 0.0
    starts = read_starts(run_dir)
    if starts and logged < datetime.fromisoformat(starts[-1]["time"]).timestamp():
        # The last start has logged no step yet; those from its first on are done again.
        steps = [record for record in steps if record["step"] < starts[-1]["step"]]
    return steps, logged
