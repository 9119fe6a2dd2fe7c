"""A small run as a job of the test cluster, and what the same run computes without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forked_runs import run_to_end
from lhcp import config_file
from lhcp.launch.prepare import Request
from lhcp.launch.site import Site
from lhcp.metrics import read_metrics
from runs import make_config, write_data
from waiting import until

STEPS = 40
"""Of each of the two stages."""
# A rank that does not end when it is told to is killed after 3 seconds instead of 10.
_ENV = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}
SITE = Site(gpus="--gres=gpu:b200:{n}", partition="main", env=_ENV)


class Runs:
    """Makes runs of one configuration in a folder, `dp` times two ranks that share each sequence.

    Args:
        folder: for data and runs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = write_data(folder)

    def config(self, name: str, dp: int = 1, **changes: Any) -> Path:
        """Write the configuration of a run in the folder of that name."""
        stages = [{"mode": "lighthouse", "steps": STEPS}, {"mode": "dense", "steps": STEPS}]
        checkpoint = {"every": 10, "stop_timeout_s": 20}
        values = {"stages": stages, "checkpoint": checkpoint, "output_dir": self.folder / name, "global_batch_size": dp}
        config = make_config(self.data, dp, 2, **(values | changes))
        path = self.folder / f"{name}.yaml"
        path.unlink(missing_ok=True)
        config_file.save(config, path)
        return path

    def request(self, name: str, nodes: int = 2, dp: int = 1, **changes: Any) -> Request:
        """As what the run is submitted: its ranks on so many nodes."""
        options = {"nodes": str(nodes), "gpus-per-node": str(2 * dp // nodes), "signal": "USR1@25"}
        return Request(template="train_1m", config=self.config(name, dp, **changes), options=options, site=SITE)

    def losses_alone(self, dp: int = 1) -> list[float]:
        """Of the same run without Slurm, and without an interruption."""
        name = f"alone-{dp}"
        path = self.config(name, dp)
        assert run_to_end(2 * dp, [str(path)], self.folder / f"{name}.out") == [0] * 2 * dp
        return losses(self.folder / name)


def losses(run_dir: Path) -> list[float]:
    """By step; all steps, in order."""
    records = read_metrics(run_dir)
    assert [record["step"] for record in records] == list(range(len(records)))
    return [record["loss"] for record in records]


def wait_for_step(run_dir: Path, step: int, timeout: float = 120) -> None:
    """Wait until a run has logged the step, from 0."""

    def reached() -> bool:
        try:
            return int(read_metrics(run_dir)[-1]["step"]) >= step
        except (FileNotFoundError, IndexError):
            return False

    until(reached, timeout, lambda: f"{run_dir} has not come to step {step}")
