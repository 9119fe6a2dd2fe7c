"""kill -9 of one rank or all, at any moment: whatever is started again ends with the weights of a run left alone.

`--kills N` sets the number of kills; the moments are drawn from a seed that is printed with a failure.
"""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from forked_runs import ForkedRun, kill_at_file_operation, only_on, run_to_end
from runs import make_config, write_data
from saved import published_tensors
from torch import Tensor

from lhcp import config_file
from lhcp.checkpoint.folder import FOLDER, published, step_folder
from lhcp.checkpoint.manifest import Checkpoint
from lhcp.metrics import read_metrics

STEPS = 20
LAYOUTS = [(1, 2), (2, 1), (1, 1)]


@dataclass
class Campaign:
    """Runs of one configuration, killed again and again."""

    folder: Path
    data: Path
    random: random.Random
    references: dict[tuple[int, int], tuple[dict[str, Tensor], list[tuple[int, float]]]] = field(default_factory=dict)
    kills: int = 0
    starts: int = 0
    runs: int = 0

    def config(self, layout: tuple[int, int], run_dir: Path) -> Path:
        config = make_config(
            self.data, *layout, global_batch_size=2, eval={}, checkpoint={"every": 2, "keep": 2}, output_dir=run_dir
        )
        path = run_dir.with_suffix(".yaml")
        config_file.save(config, path)
        return path

    def outcome(self, run_dir: Path) -> tuple[dict[str, Tensor], list[tuple[int, float]]]:
        losses = [(record["step"], record["loss"]) for record in read_metrics(run_dir)]
        return published_tensors(run_dir, STEPS), losses

    def reference(self, layout: tuple[int, int]) -> tuple[dict[str, Tensor], list[tuple[int, float]]]:
        if layout not in self.references:
            run_dir = self.folder / f"left-alone-{layout}"
            codes = run_to_end(layout[0] * layout[1], [str(self.config(layout, run_dir))], self.folder / "alone.txt")
            assert codes == [0] * len(codes)
            self.references[layout] = self.outcome(run_dir)
        return self.references[layout]

    def one_run(self) -> None:
        """Start a run until it ends by itself, and compare it with the one that was left alone."""
        layout = self.random.choice(LAYOUTS)
        tensors, losses = self.reference(layout)
        self.runs += 1
        run_dir = self.folder / f"run-{self.runs}"
        output = run_dir.with_suffix(".txt")
        config = self.config(layout, run_dir)
        while not self.one_start(layout[0] * layout[1], config, run_dir, output):
            for step in published(run_dir):
                Checkpoint.open(step_folder(run_dir, step)).verify()
        found, found_losses = self.outcome(run_dir)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors), output.read_text()
        assert found_losses == losses
        assert sorted(path.name for path in (run_dir / FOLDER).iterdir()) == ["step-00000018", "step-00000020"]

    def one_start(self, world: int, config: Path, run_dir: Path, output: Path) -> bool:
        """Whether it got through; else it was killed."""
        self.starts += 1
        victims = list(range(world)) if self.random.random() < 0.5 else [self.random.randrange(world)]
        at_file = self.random.random() < 0.5
        before = kill_at_file_operation(self.random.randint(1, 90), run_dir / FOLDER)
        arguments = [str(config), "--resume", "last"]
        if at_file:
            run = ForkedRun(world, arguments, output, only_on(self.random.choice(victims), before))
            while len(run.alive()) == world:
                time.sleep(0.001)
        else:
            run = ForkedRun(world, arguments, output)
            moment = time.monotonic() + self.random.uniform(0.05, 2.0)
            while run.alive() and time.monotonic() < moment:
                time.sleep(0.001)
            run.send(signal.SIGKILL, victims)
        if -signal.SIGKILL in run.codes.values() or not at_file:
            run.send(signal.SIGKILL, victims)
        codes = run.wait()
        killed = -signal.SIGKILL in codes
        self.kills += killed
        assert killed or codes == [0] * world, f"exit codes {codes}:\n{output.read_text()[-3000:]}"
        return not killed


def test_killed_runs_end_as_if_nothing_had_happened(
    tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted, seed = pytestconfig.getoption("kills"), pytestconfig.getoption("fault_seed")
    campaign = Campaign(tmp_path, write_data(tmp_path), random.Random(seed))
    while campaign.kills < wanted:
        campaign.one_run()
    with capsys.disabled():
        print(f"\nseed {seed}: {campaign.kills} kills in {campaign.starts} starts of {campaign.runs} runs")
