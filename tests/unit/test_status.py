"""`lhcp status`, on run folders that the run's own code wrote."""

from __future__ import annotations

import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest
from typer.testing import CliRunner

from damage import damage
from lhcp import cli, config_file
from lhcp.checkpoint.folder import step_folder
from lhcp.checkpoint.manifest import MANIFEST_FILE, Manifest
from lhcp.config import ConfigError
from lhcp.files import write_checked
from lhcp.metrics import METRICS_FILE, STARTS_FILE, MetricsLogger, StepMetrics
from lhcp.status import RunStatus, _duration, read_status, show
from runs import make_config

NOW = 1_800_000_000.0
LIGHTHOUSE_FLOPS, DENSE_FLOPS = 23_865_216, 33_056_640
"""Of a forward pass over one sequence, by hand: 2 x 360 x 19,992 weights, and 96 x 98,656 or 194,400 pairs."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return begin(tmp_path)


def begin(tmp_path: Path, **changes: Any) -> Path:
    """A run folder before the first step; the stages are 10 Lighthouse steps and 10 dense ones."""
    config = make_config(tmp_path / "tokens", 1, 2, **changes)
    config.output_dir.mkdir()
    config_file.save(config, config.output_dir / "config.yaml")
    return config.output_dir


def log(run: Path, first: int, stop: int, *, age: float = 5.0, events: bool = False, **values: Any) -> None:
    """Log the steps [first, stop), the last of them `age` seconds before NOW; the loss is 5 minus step / 10."""
    defaults: dict[str, Any] = {"grad_norm": 1.0, "tokens_per_s_per_gpu": 1000.0, "step_s": 2.0, "stage": "-"}
    with MetricsLogger(run, 20, first) as logger:
        for step in range(first, stop):
            given = {"loss": 5 - step / 10, "tokens": 1440 * (step + 1)} | defaults | values
            logger.log(StepMetrics(step=step, lr=1e-3, mfu=None, memory_gib=1.0, **given))
            if events:
                logger.event("held_out", loss=3 - step / 10)
                logger.event("held_out_no_attention", loss=4 - step / 10)
    os.utime(run / METRICS_FILE, (NOW - age, NOW - age))


def start(run: Path, step: int, age: float = 1000.0) -> None:
    """Record a start from `step`, `age` seconds before NOW."""
    with (run / STARTS_FILE).open("a") as file:
        file.write(json.dumps({"time": iso(NOW - age), "step": step, "host": "node"}) + "\n")


def publish(run: Path, step: int, age: float = 60.0) -> Path:
    """The manifest of a checkpoint created `age` seconds before NOW."""
    folder = step_folder(run, step)
    folder.mkdir(parents=True)
    model = config_file.load(run / "config.yaml").model
    manifest = Manifest(created=iso(NOW - age), step=step, model=model, seq_len=360, versions={})
    write_checked(folder / MANIFEST_FILE, manifest.model_dump_json())
    return folder


def iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def shown(status: RunStatus, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    show(status)
    return capsys.readouterr().out.splitlines()


def test_waiting_to_start(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(run, 0)
    log(run, 0, 0)
    for _ in range(2):  # with an empty metrics file, then with none
        status = read_status(run, NOW)
        assert (status.state, status.step, status.total_steps, status.tokens) == ("waiting to start", 0, 20, 0)
        assert status.seconds_left is status.last_step_age_s is status.loss is status.checkpoint is None
        (run / METRICS_FILE).unlink(missing_ok=True)
    assert shown(status, capsys) == [
        f"{run}: waiting to start",
        "  step           0 of 20 (0.0%)",
        "  stage          lighthouse (1 of 2)",
        "  trained on     0 tokens",
        "  checkpoint     0 published",
        "  restarts       0",
        "  skipped steps  0",
    ]


def test_under_way(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(run, 0)
    log(run, 0, 13, age=75, events=True)
    publish(run, 5, age=4000)
    publish(run, 10, age=3 * 3600 + 20 * 60)
    status = read_status(run, NOW)
    assert (status.state, status.step, status.tokens, status.restarts) == ("stopped", 13, 13 * 1440, 0)
    assert (status.stage, status.stage_number, status.num_stages) == ("dense", 2, 2)
    assert (status.loss, status.mean_loss) == (pytest.approx(3.8), pytest.approx(4.4))
    assert (status.last_step_age_s, status.seconds_left) == (75, 14)
    assert status.checkpoint is not None
    assert (status.checkpoint.step, status.checkpoint.age_s, status.num_checkpoints) == (10, 12_000, 2)
    assert shown(status, capsys) == [
        f"{run}: stopped; last step 1 min 15 s ago",
        "  step           13 of 20 (65.0%)",
        "  stage          dense (2 of 2)",
        "  loss           3.8000 (mean of the last 20: 4.4000)",
        "  speed          1,000 tokens/s/GPU",
        "  trained on     18,720 tokens",
        "  time left      14 s of training",
        "  checkpoint     after step 10, 3 h 20 min ago; 2 published",
        "  restarts       0",
        "  skipped steps  0",
        "  held out       1.8000 after step 13 (dense)",
        "                 2.8000 after step 13 (no attention)",
    ]


def test_finished(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(run, 0, 20)
    publish(run, 15)
    assert read_status(run, NOW).state == "stopped"  # its last checkpoint may be being written
    newest = publish(run, 20)
    status = read_status(run, NOW)
    assert (status.state, status.seconds_left) == ("finished", 0)
    lines = shown(status, capsys)
    assert lines[0] == f"{run}: finished; last step 5 s ago"
    assert lines[1] == "  step           20 of 20 (100.0%)"
    assert not [line for line in lines if "time left" in line]

    (newest / MANIFEST_FILE).write_text("{}")
    assert read_status(run, NOW).state == "stopped"


def test_the_share_is_not_rounded_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begin(tmp_path, stages=[{"mode": "dense", "steps": 10_000}])
    log(run, 9_990, 9_999)
    assert shown(read_status(run, NOW), capsys)[1] == "  step           9,999 of 10,000 (99.9%)"


def test_repeated_steps_count_once(run: Path) -> None:
    start(run, 0, age=1000)
    log(run, 0, 9, loss=math.nan, tokens_per_s_per_gpu=1.0, events=True)
    start(run, 4, age=500)
    log(run, 4, 7, tokens_per_s_per_gpu=3.0)
    status = read_status(run, NOW)
    assert (status.step, status.tokens, status.restarts) == (7, 7 * 1440, 1)
    assert status.skipped_steps == 4  # 0 to 3: of the others a later record is finite
    assert (status.loss, status.mean_loss) == (pytest.approx(4.4), pytest.approx(4.5))
    assert status.tokens_per_s_per_gpu == 1.0
    assert {name: held_out.step for name, held_out in status.held_out.items()} == {
        "held_out": 7,
        "held_out_no_attention": 7,
    }


def test_a_restart_takes_steps_back_before_it_logs_any(run: Path) -> None:
    start(run, 0)
    log(run, 0, 9, age=300)
    start(run, 4, age=100)
    status = read_status(run, NOW)
    assert (status.state, status.step, status.restarts, status.last_step_age_s) == ("stopped", 4, 1, 300)
    start(run, 0, age=50)
    assert read_status(run, NOW).state == "waiting to start"
    log(run, 0, 1)
    assert (read_status(run, NOW).step, read_status(run, NOW).restarts) == (1, 2)


def test_torn_lines(run: Path) -> None:
    start(run, 0)
    log(run, 0, 3)
    for name in (METRICS_FILE, STARTS_FILE):
        with (run / name).open("a") as file:
            file.write('{"step": 3, "lo')
    os.utime(run / METRICS_FILE, (NOW, NOW))
    assert (read_status(run, NOW).step, read_status(run, NOW).restarts) == (3, 0)


def test_skipped_steps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(run, 0, 2)
    log(run, 2, 3, loss=math.inf)
    log(run, 3, 5, grad_norm=math.nan)
    log(run, 5, 6, loss=math.nan, grad_norm=math.nan, events=True)
    status = read_status(run, NOW)
    assert (status.skipped_steps, status.loss) == (4, pytest.approx(4.6))
    assert status.mean_loss == pytest.approx((5 + 4.9 + 4.7 + 4.6) / 4)
    assert status.model_dump()["held_out"]["held_out"] == {"step": 6, "loss": 2.5}
    assert "  skipped steps  4" in shown(status, capsys)


def test_nothing_is_finite(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with MetricsLogger(run, 20) as logger:
        logger.event("held_out", step=0, loss=math.nan)
    log(run, 0, 3, loss=math.nan)
    status = read_status(run, NOW)
    assert (status.loss, status.mean_loss, status.skipped_steps) == (None, None, 3)
    lines = shown(status, capsys)
    assert not [line for line in lines if line.startswith("  loss")]
    assert lines[-1] == "  held out       not finite after step 1 (dense)"


def test_means_are_over_the_last_20(tmp_path: Path) -> None:
    run = begin(tmp_path, stages=[{"mode": "dense", "steps": 100}])
    log(run, 0, 30, loss=100.0, tokens_per_s_per_gpu=1.0)
    log(run, 30, 41, loss=2.0, tokens_per_s_per_gpu=5.0)
    log(run, 41, 50, loss=4.0, tokens_per_s_per_gpu=9.0)
    status = read_status(run, NOW)
    assert status.mean_loss == pytest.approx((11 * 2 + 9 * 4) / 20)
    assert status.tokens_per_s_per_gpu == 5.0


class TestTimeLeft:
    def test_of_a_stage_to_come_by_its_arithmetic(self, run: Path) -> None:
        log(run, 0, 6, step_s=2.0)
        assert read_status(run, NOW).seconds_left == pytest.approx(4 * 2.0 + 10 * 2.0 * DENSE_FLOPS / LIGHTHOUSE_FLOPS)

    def test_at_the_end_of_a_stage(self, run: Path) -> None:
        log(run, 0, 10, step_s=2.0)
        status = read_status(run, NOW)
        assert (status.stage, status.stage_number) == ("lighthouse", 1)
        assert status.seconds_left == pytest.approx(27.7027, abs=1e-4)

    def test_by_its_own_steps(self, run: Path) -> None:
        log(run, 0, 10, step_s=2.0)
        log(run, 10, 13, step_s=7.0)
        assert read_status(run, NOW).seconds_left == 7 * 7.0

    def test_by_the_last_50_of_them(self, tmp_path: Path) -> None:
        run = begin(tmp_path, stages=[{"mode": "dense", "steps": 100}])
        log(run, 0, 30, step_s=9.0)
        log(run, 30, 56, step_s=1.0)
        log(run, 56, 80, step_s=3.0)
        assert read_status(run, NOW).seconds_left == 20 * 1.0

    def test_by_a_stage_of_the_same_mode_if_there_is_one(self, tmp_path: Path) -> None:
        modes = ["lighthouse", "dense", "lighthouse", "dense"]
        run = begin(tmp_path, stages=[{"mode": mode, "steps": 5} for mode in modes])
        log(run, 0, 5, step_s=2.0)
        log(run, 5, 9, step_s=100.0)
        assert read_status(run, NOW).seconds_left == 100.0 + 5 * 2.0 + 5 * 100.0


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", [MANIFEST_FILE, f"{MANIFEST_FILE}.sha256"])
def test_damaged_newest_checkpoint(run: Path, capsys: pytest.CaptureFixture[str], seed: int, name: str) -> None:
    log(run, 0, 12)
    publish(run, 5)
    newest = publish(run, 10)
    done = damage(newest / name, Random(seed))
    status = read_status(run, NOW)
    assert status.checkpoint is not None
    assert (status.checkpoint.step, status.num_checkpoints) == (5, 2), done
    (message,) = status.damaged_checkpoints
    assert message.startswith(f"{newest}/{MANIFEST_FILE}"), done
    lines = shown(status, capsys)
    place = lines.index("  checkpoint     after step 5, 1 min 0 s ago; 2 published")
    assert lines[place + 1] == f"                 {message}"  # however long, one line where it may be piped


def test_no_whole_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(run, 0, 12)
    for step in (5, 10):
        (publish(run, step) / MANIFEST_FILE).write_text("")
    status = read_status(run, NOW)
    assert status.checkpoint is None
    newest, older = status.damaged_checkpoints
    assert "step-00000010" in newest
    assert "step-00000005" in older
    assert "  checkpoint     2 published" in shown(status, capsys)


def test_not_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_status(tmp_path, NOW)
    assert str(caught.value) == f"{tmp_path} is not a run folder: it has no config.yaml; name the output_dir of a run"
    with pytest.raises(ConfigError, match=r"absent is not a run folder: there is no such folder; name the output_dir"):
        read_status(tmp_path / "absent", NOW)
    (tmp_path / "config.yaml").write_text("name: other\n")
    with pytest.raises(ConfigError, match=r"config\.yaml is not a configuration of this version of lhcp:\n.*required"):
        read_status(tmp_path, NOW)


def test_command(run: Path) -> None:
    log(run, 0, 7, events=True)
    publish(run, 5)
    printed = CliRunner().invoke(cli.app, ["status", str(run)])
    assert printed.exit_code == 0, printed.output
    assert printed.output.startswith(f"{run}: stopped; last step ")
    assert "\n  step           7 of 20 (35.0%)\n" in printed.output
    as_json = CliRunner().invoke(cli.app, ["status", str(run), "--json"])
    found = json.loads(as_json.output)
    expected = json.loads(read_status(run, NOW).model_dump_json())
    assert found.keys() == expected.keys()
    assert (found["state"], found["step"], found["checkpoint"]["step"]) == ("stopped", 7, 5)
    assert found["held_out"]["held_out_no_attention"] == {"step": 7, "loss": pytest.approx(3.4)}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (86_399, "23 h 59 min"),
        (86_400 * 1234 + 7200, "1,234 d 2 h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert _duration(seconds) == text
