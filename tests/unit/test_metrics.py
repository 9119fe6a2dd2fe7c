"""What a run writes can be read again, whatever happened to the run."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from lhcp.metrics import HELD_OUT, MetricsLogger, StepMetrics, read_events, read_metrics
from lhcp.plot import _smoothed, _spread, plot_loss

STEP = StepMetrics(
    step=0,
    stage="lighthouse",
    loss=5.5,
    grad_norm=1.25,
    lr=1e-3,
    tokens=16_384,
    tokens_per_s_per_gpu=12_345.6,
    mfu=None,
    memory_gib=0.5,
    step_s=1.5,
)


def write_run(run_dir: Path, steps: int, first: int = 0, loss: float = 5.5) -> None:
    with MetricsLogger(run_dir, total_steps=steps, first_step=first) as logger:
        for step in range(first, steps):
            logger.log(replace(STEP, step=step, loss=loss, stage="lighthouse" if step < 3 else "dense"))


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(run_dir)]


def test_one_object_a_line(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "run", 4)
    records = read_metrics(tmp_path / "a" / "run")
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert records[0] == {
        "step": 0,
        "stage": "lighthouse",
        "loss": 5.5,
        "grad_norm": 1.25,
        "lr": 1e-3,
        "tokens": 16_384,
        "tokens_per_s_per_gpu": 12_345.6,
        "mfu": None,
        "memory_gib": 0.5,
        "step_s": 1.5,
    }


def test_written_at_once(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, total_steps=2) as logger:
        logger.log(STEP)
        logger.event(HELD_OUT, loss=4.0)
        assert len(read_metrics(tmp_path)) == len(read_events(tmp_path)) == 1


def test_not_finite_is_null(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, total_steps=1) as logger:
        logger.log(replace(STEP, loss=math.nan, grad_norm=math.inf))
        logger.event(HELD_OUT, loss=-math.inf)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert record["loss"] is record["grad_norm"] is None
    assert json.loads((tmp_path / "events.jsonl").read_text(), parse_constant=refuse)["loss"] is None


def test_resumed_run_supersedes_what_it_repeats(tmp_path: Path) -> None:
    write_run(tmp_path, 5, loss=3)
    write_run(tmp_path, 4, first=2, loss=2)  # killed once more, before step 4
    assert losses(tmp_path) == [(0, 3), (1, 3), (2, 2), (3, 2)]
    write_run(tmp_path, 6, first=3, loss=1)
    assert losses(tmp_path) == [(0, 3), (1, 3), (2, 2), (3, 1), (4, 1), (5, 1)]


def test_torn_line_is_skipped(tmp_path: Path) -> None:
    write_run(tmp_path, 3, loss=3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert losses(tmp_path) == [(0, 3), (1, 3), (2, 3)]
    write_run(tmp_path, 5, first=3, loss=1)
    assert losses(tmp_path) == [(0, 3), (1, 3), (2, 3), (3, 1), (4, 1)]


def test_events(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, total_steps=10) as logger:
        for step in range(4):
            logger.log(replace(STEP, step=step))
            logger.event(HELD_OUT, loss=4.0 - step, mode="dense")
            logger.event(HELD_OUT, loss=5.0 - step, mode="lighthouse")
    with MetricsLogger(tmp_path, total_steps=10, first_step=3) as logger:
        logger.event(HELD_OUT, step=3, loss=0.5, mode="dense")
    assert read_events(tmp_path)[0] == {"step": 0, "event": "held_out", "loss": 4.0, "mode": "dense"}
    of = {mode: [e["loss"] for e in read_events(tmp_path) if e["mode"] == mode] for mode in ("dense", "lighthouse")}
    assert of == {"dense": [4, 3, 2, 0.5], "lighthouse": [5, 4, 3, 2]}


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLogger(tmp_path, total_steps=3) as logger:
        for step in range(3):
            logger.log(replace(STEP, step=step, loss=float(step)))
        logger.event(HELD_OUT, loss=4.0, mode="dense")
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(0, 0), (1, 1), (2, 2)]
    assert [(e.step, e.value) for e in board.Scalars("held_out/loss")] == [(2, 4)]
    assert "train/mfu" not in board.Tags()["scalars"]


@pytest.mark.parametrize(("steps", "lines"), [(3, 3), (200, 21), (1990, 22)])
def test_few_plain_lines_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int, lines: int
) -> None:
    write_run(tmp_path, steps)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines
    assert printed[0].startswith(f"step 1/{steps}  lighthouse  loss 5.5000  grad norm 1.25  12,346 tokens/s/GPU  ")
    assert printed[-1].startswith(f"step {steps}/{steps}  ")
    assert printed[-1].endswith("  0:00:00 left")


def test_progress_bar_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with MetricsLogger(tmp_path, total_steps=8) as logger:
        for step in range(8):
            logger.log(replace(STEP, step=step))
        logger.event(HELD_OUT, loss=4.0)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "held out after step 8: loss 4.0000" in printed.err
    for fragment in ("lighthouse", "8/8", "loss 5.5000", "12,346 tokens/s/GPU", "0:00:00"):
        assert fragment in printed.err


def test_nothing_logged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path)


def test_plot(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path, total_steps=200) as logger:
        for step in range(200):
            loss = math.nan if step in (10, 199) else 5 - step / 100
            logger.log(replace(STEP, step=step, loss=loss, stage="lighthouse" if step < 150 else "dense"))
        logger.event(HELD_OUT, loss=3.0)
    assert plot_loss(tmp_path, references={"unigram entropy": 3.3}) == tmp_path / "loss.png"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_one_step_without_events(tmp_path: Path) -> None:
    write_run(tmp_path, 1)
    (tmp_path / "events.jsonl").unlink()
    assert plot_loss(tmp_path) == tmp_path / "loss.png"


def test_plot_of_no_finite_loss(tmp_path: Path) -> None:
    write_run(tmp_path, 2, loss=math.nan)
    with pytest.raises(ValueError, match="no step has a finite loss"):
        plot_loss(tmp_path)


def test_plot_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, 1)
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_loss(tmp_path) is None
    assert capsys.readouterr().out == "no loss.png: it needs matplotlib (pip install matplotlib)\n"


def test_smoothing() -> None:
    assert _smoothed([4, 1, 2, 3], 0, first=True) == [4, 1, 2, 3]
    assert _smoothed([9, 3, 0, 3, 6], 1, first=True) == [9, 4, 2, 3, 4.5]
    assert _smoothed([9, 3, 0, 3, 6], 1, first=False) == [6, 4, 2, 3, 4.5]
    assert _smoothed([1, math.nan, 3], 1, first=True) == [1, 2, 3]
    assert math.isnan(_smoothed([math.nan], 1, first=True)[0])


def test_labels_do_not_overlap() -> None:
    assert _spread([0.5, 0.1]) == [0.5, 0.1]
    assert _spread([]) == []
    placed = _spread([0.51, 0.5, 0.9, 0.5, 0.44])
    assert placed[2] == 0.9
    close = sorted(placed[:2] + placed[3:])
    assert all(b - a == pytest.approx(0.05) for a, b in pairwise(close))
    assert placed[4] < placed[1] < placed[3] < placed[0]
    assert sum(close) == pytest.approx(0.51 + 0.5 + 0.5 + 0.44)
