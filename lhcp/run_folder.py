"""The run folder, as rank 0 keeps it: the code, and what each start ran on.

config.yaml     the resolved configuration of the last start
code/           the package as the first start ran it
starts.jsonl    one object a start: when, from which step, layout, host, versions, digest of the code
logs/           one file a rank; after a hang also where each rank was, see lhcp.watchdog
metrics.jsonl, events.jsonl, tensorboard/, loss.png
checkpoints/    see lhcp.checkpoint
"""

from __future__ import annotations

import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from lhcp import config_file
from lhcp.checkpoint.folder import FOLDER, prune, remove_leftovers, set_aside
from lhcp.config import RunConfig
from lhcp.config_file import CONFIG_FILE
from lhcp.environment import now, versions
from lhcp.launch.snapshot import CODE_FOLDER, code_digest, copy_code
from lhcp.metrics import STARTS_FILE, JsonLines

LOG_FOLDER = "logs"


def begin(run_dir: Path, config: RunConfig, first_step: int, device: torch.device) -> list[Path]:
    """Record a start from step `first_step`, and clear the way for its checkpoints.

    Returns:
        Newer checkpoints, which were renamed: the run goes on before them.
    """
    remove_leftovers(run_dir)
    aside = set_aside(run_dir, first_step)
    prune(run_dir / FOLDER, config.checkpoint.keep)  # a kill may have come between a publication and this
    copy_code(run_dir / CODE_FOLDER)
    partial = run_dir / f".{CONFIG_FILE}.tmp"
    partial.unlink(missing_ok=True)
    config_file.save(config, partial)
    partial.replace(run_dir / CONFIG_FILE)
    starts = JsonLines(run_dir / STARTS_FILE)
    starts.append(_start(config, first_step, device))
    starts.close()
    return aside


def log_to(run_dir: Path, rank: int) -> Path:
    """Send this process's log records to its file under `logs`, which is returned."""
    path = run_dir / LOG_FOLDER / f"rank-{rank:05d}.log"
    path.parent.mkdir(exist_ok=True)
    logging.basicConfig(
        filename=path,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(message)s",
        force=True,
    )
    return path


def _start(config: RunConfig, first_step: int, device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    slurm = {key.lower(): os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST") if key in os.environ}
    return {
        "time": now(),
        "step": first_step,
        "dp": config.parallel.dp,
        "cp": config.parallel.cp,
        "host": platform.node(),
        "device": name,
        **slurm,
        **versions(),
        "code": code_digest(),
        "command": sys.argv,
    }
