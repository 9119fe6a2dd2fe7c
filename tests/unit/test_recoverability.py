"""The comparison of runs that switch to dense attention: what it reads, says and draws, and the runs that it starts."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import recoverability
from benchmarks.arms import less_dense, read_arm, steady_hours, without_seed
from lhcp import config_file
from lhcp.launch import grid
from lhcp.metrics import MetricsLogger, StepMetrics, read_metrics
from runs import make_config, write_data
from waiting import until

REPOSITORY = Path(__file__).resolve().parents[2]
STAGES = [{"mode": "lighthouse", "steps": 40}, {"mode": "dense", "steps": 60}]
DENSE = [{"mode": "dense", "steps": 100}]


def arm(
    folder: Path, name: str, steps: int, stages: list[dict[str, Any]] = STAGES, held_out: float = 0.5, seed: int = 0
) -> None:
    """A run whose loss is 2 before step 40, jumps to 3 there, and falls by 0.05 a step; held out, so much more."""
    run_dir = folder / name
    with MetricsLogger(run_dir, 100) as logger:
        for step in range(steps):
            loss = 2.0 if step < 40 else 3.0 - 0.05 * (step - 40)
            step_s = 36.0 if step != 40 else 72.0  # compiles again
            logger.log(StepMetrics(step, "-", loss, 1.0, 1e-3, step, 1.0, None, 1.0, step_s))
            if held_out is not None and step % 10 == 9:
                logger.event("held_out", loss=loss + held_out)
                logger.event("held_out_no_attention", loss=9.0)
    config = {"stages": stages, "parallel": {"dp": 2, "cp": 4}, "seed": seed, "seq_len": 4_096,
              "attention": {"topk": 64, "num_strata": 8}, "dense_layers": [0]}  # fmt: skip
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))


def test_recoverability_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arm(tmp_path, "finished", 100)
    arm(tmp_path, "dense", 100, [{"mode": "dense", "steps": 100}], held_out=None)
    arm(tmp_path, "short", 50)
    arm(tmp_path, "before", 40)
    arm(tmp_path, "empty", 0)
    (tmp_path / "jobs" / "001").mkdir(parents=True)
    (tmp_path / "names").write_text("finished\nshort\nabsent\n")
    capsys.readouterr()
    assert recoverability.main(["report", str(tmp_path), "--expect", str(tmp_path / "names")]) == 1
    text = capsys.readouterr().out
    assert text == (tmp_path / "recoverability.md").read_text()
    rows = [row for row in cells(text) if len(row) == 9 and row[0] != "run"]
    # The mean of dense steps 19 to 24 is the first of six at or below 2: theirs are 2.1, 2.05, ... 1.85.
    both = "40 lighthouse, 60 dense"
    assert rows[-4:] == [
        ["before", both, "2.0000", "-", "-", "-", "-", "-", "24.00 min"],
        ["dense", "100 dense", "-", "-", "-", "-", "0.2750", "-", "1.0 h"],
        ["finished", both, "2.0000", "+0.0000", "+1.0000", "24", "0.1750", "0.5500", "1.0 h"],
        ["short", both, "2.0000", "+0.0000", "+1.0000", "-", "-", "-", "30.60 min"],
    ]
    assert [line for line in text.splitlines() if line.startswith("- ")] == [
        "- short: unfinished: 50 of 100 steps",
        "- absent: no result: see its log",
        "- before: unfinished: 40 of 100 steps",
        "- empty: no step was logged: see its log",
    ]
    written = json.loads((tmp_path / "recoverability.json").read_text())
    assert (written["arms"]["finished"]["recovered_after"], written["arms"]["finished"]["ranks"]) == (24, 8)


def test_recoverability_of_finished_arms(tmp_path: Path) -> None:
    arm(tmp_path, "one", 100)
    (tmp_path / "names").write_text("one\n")
    assert recoverability.main(["report", str(tmp_path), "--expect", str(tmp_path / "names")]) == 0
    (tmp_path / "one" / "config.yaml").write_text("stages: 5")
    assert recoverability.main(["report", str(tmp_path), "--expect", str(tmp_path / "names")]) == 1
    assert "- one: " in (tmp_path / "recoverability.md").read_text()


@pytest.mark.parametrize(
    ("losses", "spike", "back"),
    [
        ([1.0] * 40 + [0.9] * 60, -0.1, 0),
        ([1.0] * 40 + [1.5] * 60, 0.5, None),
        ([1.0] * 40 + [1.0, 4.0] + [0.5] * 58, 3.0, 8),  # the peak is in the mean of 6 until step 8
        ([1.0] * 40 + [None] * 5 + [1.5] * 5 + [0.5] * 50, 0.5, 13),
    ],
)
def test_spike_and_recovery(losses: list[float | None], spike: float, back: int | None, tmp_path: Path) -> None:
    arm(tmp_path, "arm", 0)
    with MetricsLogger(tmp_path / "arm", 100) as logger:
        for step, loss in enumerate(losses):
            value = math.nan if loss is None else loss
            logger.log(StepMetrics(step, "-", value, 1.0, 1e-3, step, 1.0, None, 1.0, 1.0))
    found = read_arm(tmp_path / "arm")
    assert found["spike"] == pytest.approx(spike)
    assert found["recovered_after"] == back


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if "|" in line]


def test_arms_are_summed_up_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each run is compared with the dense one of its own seed: dense runs differ by 0.2, and k32 has one seed."""
    for name, seed, stages, held_out in [
        ("dense", 0, DENSE, 0.5), ("dense", 1, DENSE, 0.7), ("sparse", 0, STAGES, 0.4), ("sparse", 1, STAGES, 0.9),
        ("k32", 1, STAGES, 0.75),
    ]:  # fmt: skip
        arm(tmp_path, f"{name},seed={seed}", 100, stages, held_out, seed)
    arm(tmp_path, "sparse,seed=2", 99)
    capsys.readouterr()
    assert recoverability.main(["report", str(tmp_path)]) == 1
    (tmp_path / "sparse,seed=2" / "config.yaml").unlink()
    capsys.readouterr()
    assert recoverability.main(["report", str(tmp_path)]) == 0
    rows = cells(capsys.readouterr().out)
    # Dense with seed 1 falls from 1.25 to 0.75 in its last ten steps, so had 0.80 after 99.
    # S is 4096 / 16 + 2 x 4 x 64 = 768. A hundred steps take an hour and one more step, less 36 s that compiled.
    assert rows[2:5] == [
        ["dense", "1", "2", "0.6500 (0.5500 to 0.7500)", "-", "-", "-", "1.0 h", "1.00", "-"],
        ["k32", "0.19", "1", "0.8000", "+0.0500", "+1.00", "24", "1.0 h", "1.00", "0.99"],
        ["sparse", "0.19", "2", "0.7000 (0.4500 to 0.9500)", "+0.0500 (-0.1000 to +0.2000)",
         "+1.00 (+1.00 to +1.00)", "24 (24 to 24)", "1.0 h", "1.00", "-"],  # dense never was as good as seed 0
    ]  # fmt: skip
    for picture in ("recoverability.png", "arms.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "recoverability.json").read_text())["arms"]["sparse,seed=1"]
    assert written["curve"]["every"] == 1
    assert written["curve"]["loss"][39:42] == [2.0, 3.0, 2.95]
    assert written["after_switch"][:2] == [3.0, 2.95]
    assert len(written["after_switch"]) == 60
    assert [(event["steps"], event["mode"]) for event in written["held_out"]][:2] == [
        (10, "dense"),
        (10, "no_attention"),
    ]


def test_times_of_different_devices_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, stages, device in [("dense", DENSE, "one"), ("same", STAGES, "one"), ("other", STAGES, "two")]:
        arm(tmp_path, name, 100, stages)
        start = {"time": "2026-01-01T00:00:00+00:00", "step": 0, "device": device}
        (tmp_path / name / "starts.jsonl").write_text(json.dumps(start) + "\n")
    assert recoverability.main(["report", str(tmp_path)]) == 0
    rows = {row[0]: row for row in cells(capsys.readouterr().out)[2:5]}
    assert rows["same"][-2:] == ["1.00", "1.00"]
    assert rows["other"][-2:] == ["-", "-"]
    assert rows["other"][4] == rows["same"][4] == "+0.0000"


def test_an_arm_s_numbers(tmp_path: Path) -> None:
    arm(tmp_path, "one", 60, seed=3)
    found = read_arm(tmp_path / "one")
    assert found["seconds_per_step"] == [36.0, 36.0]
    assert steady_hours(found) == pytest.approx(60 * 36 / 3600)
    assert found["hours"] == pytest.approx(61 * 36 / 3600)
    assert (found["seed"], found["subsequence"], found["dense_layers"]) == (3, 768, [0])
    dense = found | {"stages": DENSE, "held_out_loss": 1.0}
    sparse = found | {"held_out_loss": 1.5}
    assert less_dense([sparse], [dense, sparse]) == [0.5]
    for key, value in [("seed", 4), ("seq_len", 8_192), ("data", "other"), ("eval_sequences", 3), ("total_steps", 99)]:
        assert less_dense([sparse], [dense | {key: value}, sparse]) == []
    assert less_dense([sparse], [dense, dense, sparse]) == []  # which of the two?
    names = ["dense,seed=0", "seed=12", "k=5,seed=3,lr=1", "dense"]
    assert [without_seed(name) for name in names] == ["dense", "run", "k=5,lr=1", "dense"]


def test_a_stage_of_one_step_is_enough(tmp_path: Path) -> None:
    arm(tmp_path, "one", 60, [{"mode": "lighthouse", "steps": 1}, {"mode": "dense", "steps": 99}])
    found = read_arm(tmp_path / "one")
    assert (found["switch"], found["loss_before"], found["largest_before"], found["spike"]) == (1, 2.0, 0.0, 1.0)


def test_long_curves_are_thinned(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path / "long", 4_001) as logger:
        for step in range(4_001):
            loss = math.nan if 3 <= step < 6 else float(step)
            logger.log(StepMetrics(step, "-", loss, 1.0, 1e-3, step, 1.0, None, 1.0, 1.0))
    config = {"stages": [{"mode": "dense", "steps": 4_001}], "parallel": {}}
    (tmp_path / "long" / "config.yaml").write_text(yaml.safe_dump(config))
    curve = read_arm(tmp_path / "long")["curve"]
    assert curve["every"] == 3
    assert curve["loss"][:3] == [1.0, None, 7.0]
    assert curve["loss"][-1] == 3999.5
    assert len(curve["loss"]) == 1_334


def test_passkeys_are_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arm(tmp_path, "dense", 100, DENSE)
    rows = [{"mode": mode, "attended": mode, "length": length, "samples": 4, "depth": depth, "found": found}
            for mode, depth, length, found in [
                ("dense", 0, 100, 4), ("dense", 0, 200, 2), ("dense", 50, 100, 2), ("dense", 50, 200, 0),
                ("lighthouse", 0, 100, 0)]]  # fmt: skip
    keys = tmp_path / "dense" / "passkey.json"
    for wrong in ("[1]", "{", json.dumps({"task": "passkey", "step": 99, "rows": rows}),
                  json.dumps({"task": "passkey", "step": 100, "rows": rows[-1:]})):  # fmt: skip
        keys.write_text(wrong)
        capsys.readouterr()
        assert recoverability.main(["report", str(tmp_path)]) == 1
        assert "- dense: its passkey.json is not of the dense model after its last step" in capsys.readouterr().out
    keys.write_text(json.dumps({"task": "passkey", "step": 100, "rows": rows}))
    capsys.readouterr()
    assert recoverability.main(["report", str(tmp_path)]) == 0
    assert ["dense", "75%", "25%", "50%"] in cells(capsys.readouterr().out)
    assert (tmp_path / "passkeys.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def small_grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    config = make_config(
        write_data(folder), 1, 1, stages=[{"mode": "lighthouse", "steps": 3}, {"mode": "dense", "steps": 3}]
    )
    config_file.save(config, folder / "base.yaml")
    arms = {"dense": {"stages": [{"mode": "dense", "steps": 6}]}, "sparse": {}, "k16": {"attention.topk": 16}}
    (folder / "grid.yaml").write_text(yaml.safe_dump({"config": str(folder / "base.yaml"), "arms": arms}))
    return folder / "grid.yaml"


def test_arms_run_one_after_the_other_and_once(small_grid: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = small_grid.parent / "out"
    words = ["run", str(small_grid), "--out", str(out), "--only", "dense", "--only", "s*", "--set", "seed=5"]
    assert recoverability.main(words) == 0
    done = {name: (out / name / "metrics.jsonl").read_bytes() for name in ("dense", "sparse")}
    assert not (out / "k16").exists()
    assert [len(read_metrics(out / name)) for name in done] == [6, 6]
    written = json.loads((out / "recoverability.json").read_text())
    assert {arm["seed"] for arm in written["arms"].values()} == {5}
    assert written["arms"]["dense"]["held_out_loss"] != written["arms"]["sparse"]["held_out_loss"]
    capfd.readouterr()
    assert recoverability.main(words) == 0
    assert "arm 1 of 2: dense, done\narm 2 of 2: sparse, done\n# Recoverability" in capfd.readouterr().out
    assert {name: (out / name / "metrics.jsonl").read_bytes() for name in done} == done
    for key in ("optim.lr=0.5", "stages=[{mode: dense, steps: 6}]", "eval.sequences=1"):
        assert recoverability.main([*words, "--only", "sparse", "--set", key]) == 2
        assert re.search(rf"{key.split('.')[0].split('=')[0]} is now .* choose another --out", capfd.readouterr().err)
    # A kill after the last step leaves it without its evaluation and checkpoint.
    events = out / "sparse" / "events.jsonl"
    kept = [line for line in events.read_text().splitlines() if json.loads(line)["step"] != 5]
    events.write_text("".join(f"{line}\n" for line in kept))
    assert recoverability.main(["report", str(out)]) == 1
    assert "- sparse: its evaluation after the last step is missing" in capfd.readouterr().out
    before = json.loads((out / "recoverability.json").read_text())["arms"]["sparse"]
    assert before["held_out_loss"] is None
    assert recoverability.main(words) == 0
    again = json.loads((out / "recoverability.json").read_text())["arms"]["sparse"]
    assert again["held_out_loss"] == written["arms"]["sparse"]["held_out_loss"]


def test_told_to_stop_is_not_the_next_arm(small_grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    steps = ["--set", "stages=[{mode: dense, steps: 5000}]", "--set", "checkpoint.every=0"]
    line = [sys.executable, "-m", "benchmarks.recoverability", "run", small_grid, "--out", out, *steps]
    with subprocess.Popen(line, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: (out / "dense" / "metrics.jsonl").exists(), 120, lambda: "no step")
        process.send_signal(signal.SIGHUP)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGHUP
    assert "stopped in arm 1 of 3; 0 before it are done; the same command goes on" in errors
    assert not (out / "sparse").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "k17"], "--only k17: no such arm in "),
        (["--set", "optim.lr=-1"], "dense: optim.lr: given -1, must be greater than 0"),
        (["--set", "attention.topk=7"], "dense: topk 7"),
        (["--set", "data.path=nowhere"], "dense: "),
    ],
)
def test_a_wrong_arm_ends_before_any_starts(
    small_grid: Path, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "attention.topk=7" in words:
        message = "sparse: num_strata 8 is not legal"
        words = [*words, "--only", "sparse"]
    assert recoverability.main(["run", str(small_grid), "--out", str(tmp_path / "out"), *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_small_grids_are_complete() -> None:
    """Each arm of launch/configs/small is a legal run on one GPU, and S is a quarter of N but where that is varied."""
    shares = {}
    for name in ("recoverability", "ablations", "passkey"):
        common, elements = grid.load(REPOSITORY / "launch/configs/small" / f"{name}.yaml")
        for element in elements:
            config = config_file.load(REPOSITORY / common, element.overrides).resolve(1)
            assert config.total_steps * config.global_batch_size * config.seq_len >= 50e6
            shares[element.name] = config.attention.subsequence_length(config.padded_len) / config.seq_len
    assert shares["lighthouse,seed=1"] == 0.25
    assert {name for name, share in shares.items() if share > 0.25} == {"k768,seed=0", "p2,seed=0"}


def test_the_grid_of_the_paper_s_rows_is_their_files() -> None:
    rows = REPOSITORY / "launch/configs/paper"
    common, elements = grid.load(REPOSITORY / "launch/configs/paper-rows.yaml")
    assert {element.name for element in elements} == {path.stem for path in rows.glob("*.yaml")}
    for element in elements:
        config = config_file.load(REPOSITORY / common, element.overrides)
        own = config_file.load(rows / f"{element.name}.yaml")
        assert config == own.model_copy(update={"output_dir": config.output_dir}), element.name
        config.resolve(8)
