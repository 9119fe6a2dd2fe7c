"""Records of jobs that no Slurm has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lhcp.launch.jobs import Job


def job_record(folder: Path, number: str = "7", **changes: Any) -> Job:
    """Of a job that trains, submitted from `folder`, which is OUT/jobs/NUMBER."""
    values: dict[str, Any] = {
        "job_id": number, "name": folder.parents[1].name, "folder": folder, "log": folder / f"slurm-{number}.out",
        "submitted": "now", "template": "train_98k", "options": {}, "trains": True,
    }  # fmt: skip
    return Job(**(values | changes))
