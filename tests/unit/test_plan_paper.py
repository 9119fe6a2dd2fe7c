"""The comparison of plans with what is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import paper
from lhcp import config_file
from lhcp.plan import GPUS, plan_run


def test_every_published_run_has_a_file_and_every_file_a_row() -> None:
    assert sorted(row.config for row in paper.ROWS) == sorted(path.stem for path in paper.CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("row", paper.ROWS, ids=[row.config for row in paper.ROWS])
def test_a_file_is_the_run_that_its_name_says(row: paper.Row) -> None:
    run = config_file.load(paper.CONFIGS / f"{row.config}.yaml")
    words = row.config.split("-")
    assert (run.global_batch_size, run.total_steps, run.output_dir.name) == (32, 16_000, row.config)
    assert run.seq_len == (262_144 if "256k" in words else 98_304)
    assert run.parallel.cp == next((int(word[2:]) for word in words if word.startswith("cp")), 1)
    if row.config == "dense":
        assert [stage.mode for stage in run.stages] == ["dense"]
        return
    assert run.dense_layers == [0, 1, 28, 29]
    attention = run.attention
    pyramid = f"l{attention.num_levels}-p{attention.pooling_factor}-k{attention.topk}-{attention.scorer}"
    assert pyramid in row.config
    split = [int(word[:-1]) * 1000 for word in words[-2:] if word[:-1].isdecimal()] or [10_000, 6_000]
    assert [(stage.mode, stage.steps) for stage in run.stages] == list(zip(("lighthouse", "dense"), split, strict=True))


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert paper.main(["--out", str(tmp_path / "new" / "paper")]) == 0
    text = (tmp_path / "new" / "paper.md").read_text()
    assert capsys.readouterr().out == text
    rows = json.loads((tmp_path / "new" / "paper.json").read_text())["rows"]
    assert [row["run"] for row in rows] == [row.config for row in paper.ROWS]
    plan = plan_run(config_file.load(paper.CONFIGS / "dense.yaml"), 8, GPUS["b200"])
    speed = rows[0]["ktok_per_s"]
    assert speed["plan"] == pytest.approx(plan.stages[0].tokens_per_s_per_gpu / 1e3)
    assert speed["error"] == pytest.approx(speed["plan"] / 45.6 - 1)
    assert rows[0]["gpu_hours"]["plan"] == pytest.approx(plan.gpu_hours)
    assert f"| {100 * speed['error']:+.0f} |" in text.replace("  ", " ").replace("  ", " ").replace("  ", " ")


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert paper.main(["--out", str(tmp_path / "file" / "paper")]) == 2
    assert "cannot be written" in capsys.readouterr().err
