"""Faults at random: kill -9 at any moment, damage anywhere in checkpoints and data.

`--kills N` and `--damages N` set how many, `--fault-seed N` which. The long form is
`pytest tests/dist/test_faults.py --kills 200 --damages 500`.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from damage import damage
from forked_runs import ForkedRun, kill_at_file_operation, only_on, run_to_end
from lhcp import config_file
from lhcp.checkpoint.folder import FOLDER, published, step_folder
from lhcp.checkpoint.manifest import Checkpoint, FileEntry
from lhcp.config import ConfigError
from lhcp.data import verify_shards
from lhcp.files import sha256_of, write_checked
from lhcp.metrics import read_metrics
from runs import make_config, write_data
from saved import published_tensors

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


@dataclass
class Finished:
    """A run that has ended, with what it began with and the two checkpoints that it kept."""

    config: Path
    run_dir: Path
    data: Path
    final: dict[str, Tensor]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    campaign = Campaign(folder, write_data(folder), random.Random(0))
    final, _ = campaign.reference((1, 2))
    run_dir = folder / "left-alone-(1, 2)"
    return Finished(run_dir.with_suffix(".yaml"), run_dir, campaign.data, final)


def test_every_damage_is_detected(finished: Finished, pytestconfig: pytest.Config) -> None:
    """One bit, a cut or an addition in any file of a checkpoint or of the data; the message names a file there."""
    generator = random.Random(pytestconfig.getoption("fault_seed"))
    newest = step_folder(finished.run_dir, STEPS)
    count = pytestconfig.getoption("damages")
    for number in range(count):
        folder = finished.data if number % 3 == 0 else newest
        path = generator.choice(sorted(folder.iterdir()))
        content = path.read_bytes()
        what = damage(path, generator)
        try:
            with pytest.raises(ConfigError) as caught:
                verify_shards(folder) if folder == finished.data else Checkpoint.open(folder).verify()
            assert str(folder) in str(caught.value), what
        finally:
            path.write_bytes(content)
    verify_shards(finished.data)
    Checkpoint.open(newest).verify()


@pytest.mark.parametrize("name", ["manifest.json", "manifest.json.sha256", "index.json", "rank-00001.safetensors"])
def test_a_damaged_checkpoint_is_refused_and_last_good_takes_the_one_before(
    finished: Finished, tmp_path: Path, name: str
) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "out.txt"
    shutil.copytree(finished.run_dir, run_dir)
    path = step_folder(run_dir, STEPS) / name
    what = damage(path, random.Random(name))
    arguments = [str(finished.config), "--set", f"output_dir={run_dir}", "--resume"]
    assert run_to_end(2, [*arguments, "last"], output)[0] == 2, what
    message = output.read_text()
    assert message.startswith("error: ")
    assert str(path).removesuffix(".sha256") in message
    assert message.endswith("go on from the newest whole checkpoint with --resume last-good\n")
    assert published(run_dir) == [STEPS - 2, STEPS], "a refusal changes nothing"

    assert run_to_end(2, [*arguments, "last-good"], output) == [0, 0]
    found = published_tensors(run_dir, STEPS)
    assert all(torch.equal(found[key], finished.final[key]) for key in finished.final)
    assert (run_dir / FOLDER / f"set-aside-1-step-{STEPS:08d}" / name).exists(), "nothing is deleted"


def test_damaged_data_is_refused(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished.data, tmp_path / "tokens")
    shard = tmp_path / "tokens" / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"!\0")  # a token, as good as any
    output = tmp_path / "out.txt"
    arguments = [str(finished.config), "--set", f"output_dir={tmp_path / 'run'}"]
    assert run_to_end(2, [*arguments, "--set", f"data.path={tmp_path / 'tokens'}"], output)[0] == 2
    assert "train-00000.bin is damaged" in output.read_text()
    assert not (tmp_path / "run" / FOLDER).exists()


def test_nothing_is_unpickled(finished: Finished, tmp_path: Path) -> None:
    """A checkpoint by someone who can make checksums, too: its files hold a pickle that would run a command."""
    run_dir, output, trace = tmp_path / "run", tmp_path / "out.txt", tmp_path / "unpickled"
    shutil.copytree(finished.run_dir, run_dir)
    folder = step_folder(run_dir, STEPS - 2)
    shutil.rmtree(step_folder(run_dir, STEPS))
    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
        torch.save(Payload(trace), folder / name)
    manifest = Checkpoint.open(folder).manifest
    files = {
        name: FileEntry(bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
        for name in manifest.files
    }
    write_checked(folder / "manifest.json", manifest.model_copy(update={"files": files}).model_dump_json())
    codes = run_to_end(2, [str(finished.config), "--set", f"output_dir={run_dir}", "--resume", "last"], output)
    assert codes[0] not in (0, 75)
    assert not trace.exists()


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)
