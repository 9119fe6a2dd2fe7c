"""Which steps the profiler records, what it leaves, and what of its configuration is refused."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from lhcp import config_file
from lhcp.config import ConfigError
from lhcp.config.run import ProfileConfig
from lhcp.profiler import StepProfiler
from runs import make_config

DEMO = Path(__file__).resolve().parents[2] / "launch" / "configs" / "demo.yaml"
CPU = torch.device("cpu")


def run_steps(profiler: StepProfiler, first: int, last: int) -> None:
    for number in range(first, last + 1):
        with profiler.step(number):
            torch.ones(8, 8) @ torch.ones(8, 8)


def left_by(run_dir: Path) -> dict[str, list[str]]:
    """The traces of a run, each with the steps that it marks; nothing half-written is there."""
    assert not list((run_dir / "profile").glob(".*"))
    found = {}
    for path in (run_dir / "profile").glob("trace-*"):
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        found[path.name] = sorted(event["name"] for event in events if event["name"].startswith("step "))
        assert sum(event["name"] == "aten::mm" for event in events) == len(found[path.name])
    return found


@pytest.mark.parametrize(
    ("first", "last", "recorded"),
    [(1, 9, [3, 4, 5]), (4, 9, [4, 5]), (1, 3, [3]), (5, 5, [5]), (1, 2, []), (6, 9, [])],
)
def test_the_steps_of_the_range_that_are_run(tmp_path: Path, first: int, last: int, recorded: list[int]) -> None:
    with StepProfiler(ProfileConfig(steps="3:5"), tmp_path, CPU) as profiler:
        run_steps(profiler, first, last)
    span = f"steps-{min(recorded, default=0)}-{max(recorded, default=0)}"
    marks = [f"step {number}" for number in recorded]
    assert left_by(tmp_path) == ({f"trace-{span}.json.gz": marks} if recorded else {})
    assert [path.name for path in tmp_path.glob("profile/kernels-*")] == [f"kernels-{span}.txt"] * bool(recorded)


def test_nothing_wanted_leaves_nothing(tmp_path: Path) -> None:
    with StepProfiler(ProfileConfig(), tmp_path, CPU) as profiler:
        run_steps(profiler, 1, 3)
    assert list(tmp_path.iterdir()) == []


def test_what_was_recorded_before_an_error_is_kept(tmp_path: Path) -> None:
    def fail() -> None:
        with StepProfiler(ProfileConfig(steps="2:9"), tmp_path, CPU) as profiler:
            run_steps(profiler, 1, 2)
            with profiler.step(3):
                torch.ones(8, 8) @ torch.ones(8, 8)
                raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert left_by(tmp_path) == {"trace-steps-2-3.json.gz": ["step 2", "step 3"]}


def test_the_table_adds_up_and_the_user_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StepProfiler(ProfileConfig(steps="2:3"), tmp_path, CPU) as profiler:
        run_steps(profiler, 1, 4)
    title, _, header, *lines = (tmp_path / "profile" / "kernels-steps-2-3.txt").read_text().splitlines()
    assert header.split() == ["ms", "share", "calls", "us", "a", "call", "op"]
    rows = {line.split(maxsplit=4)[4]: line.split()[:4] for line in lines}
    assert rows["aten::mm"][2] == "2"
    times = [float(ms.replace(",", "")) for ms, *_ in rows.values()]
    assert times == sorted(times, reverse=True)
    whole = re.fullmatch(r"steps 2 to 3, rank 0: ([0-9.,]+) ms on the CPU, op by op", title)
    assert whole is not None
    assert sum(times) == pytest.approx(float(whole[1].replace(",", "")), abs=1e-3 * len(times))
    assert capsys.readouterr().out == (
        f"profile of steps 2 to 3: {tmp_path}/profile/trace-steps-2-3.json.gz opens in https://ui.perfetto.dev, "
        f"kernels-steps-2-3.txt has the time by CPU op\n"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")
@pytest.mark.parametrize(
    "size", ["4k", "8k", "12k"]
)  # too small for the table; the trace, of which torch writes nothing; half
def test_a_full_disk_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path)], check=True)
    try:
        (tmp_path / "filler").write_bytes(bytes(4096))
        with StepProfiler(ProfileConfig(steps="1:2"), tmp_path, CPU) as profiler:
            run_steps(profiler, 1, 3)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "warning: the profile of steps 1 to 2 is not written: " in captured.err
        assert ("No space left on device" if size == "4k" else "; is the disk full?\n") in captured.err
        assert list((tmp_path / "profile").iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize("steps", ["10:13", "2:3", "10:75", "1:1"])
def test_a_range_is_no_number_of_base_60(tmp_path: Path, steps: str) -> None:
    """YAML 1.1 would read 10:13 as 613: on the command line, in a file, and in the file of a run folder."""
    config = config_file.load(DEMO, [f"profile.steps={steps}"])
    assert config.profile.steps == steps
    (tmp_path / "run.yaml").write_text(DEMO.read_text().replace("  steps: null  ", f"  steps: {steps}  "))
    assert config_file.load(tmp_path / "run.yaml") == config
    config_file.save(config, tmp_path / "saved.yaml")
    assert config_file.load(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        *(
            ([f"profile.steps={wrong}"], f"profile.steps: given {shown}, must be FIRST:LAST, counted from 1, such as ")
            for wrong, shown in (("613", "613"), ("0:3", "'0:3'"), ("5:4", "'5:4'"), ("1:2:3", "'1:2:3'"))
        ),
        (["profile.memory=true"], "profile: memory needs steps, FIRST:LAST, such as 10:13"),
        (["profile.steps=191:200"], "profile.steps 191:200: the run ends with step 190; begin at most there"),
        (
            ["profile.steps=1:2", "profile.memory=true"],
            "profile.memory records the memory of a GPU, and the run is on CPUs; set it to false",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_file.load(DEMO, overrides).resolve(2)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_what_is_legal_at_the_limits(tmp_path: Path) -> None:
    for device, steps in (("cpu", "20:20"), ("cpu", "20:999")):
        assert make_config(tmp_path, 1, 1, device=device, profile={"steps": steps}).profile.range is not None
    config = make_config(tmp_path, 1, 1, device="auto", profile={"steps": "1:2", "memory": True})
    with pytest.raises(ConfigError, match="the run is on CPUs"):
        config.profile.check_device("cpu")
    config.profile.check_device("cuda")
