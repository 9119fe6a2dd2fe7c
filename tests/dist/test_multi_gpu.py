"""`benchmarks/multi_gpu.sh` from end to end at its toy sizes: 2 and 4 processes of this machine's CPU."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import layer
from waiting import until

SCRIPT = Path(__file__).parents[2] / "benchmarks/multi_gpu.sh"
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
ROWS = {
    "scaling/exact-bfloat16-cp{n}", "scaling/exact-float32-cp{n}", "layouts/float64-x{n}", "scaling/1k-cp{n}",
    "scaling/1k-cp{n}-emulated", "train/1k-cp{n}", "train/1k-dp{n}", "scaling/1k-cp{n}-exchanges", "scaling/1k-cp1",
}  # fmt: skip
OF_FOUR = {"scaling/exact-bfloat16-cp2", "scaling/exact-float32-cp2", "scaling/1k-cp2"}


def start(out: Path, *words: str) -> subprocess.Popen[str]:
    command = [str(SCRIPT), str(out), "--toy", *words]
    # The parent of whatever it leaves, which an orphan of a container's is not.
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(out: Path, *words: str) -> tuple[int, str]:
    process = start(out, *words)
    text, _ = process.communicate(timeout=620)  # a call ends by itself within 600
    return process.returncode, text


def results(out: Path, kind: str) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (out / kind).glob("*.json")}


def processes_of(out: Path) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        found += [command] if str(out) in command else []
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two processes: a call that ends before all is done, one that is told to end in mid row, a third."""
    out = tmp_path_factory.mktemp("multi-gpu") / "two: it's here"
    code, text = finish(out, "--ranks", "2", "--minutes", "2")
    assert (code, text.splitlines()[-1]) == (75, "rows are left: the same again goes on"), text
    assert "- train/1k-dp2: not measured yet" in (out / "multi_gpu.md").read_text()
    script = start(out, "--ranks", "2")
    until((out / "logs/train-1k-dp2.log").exists, 200, lambda: str(processes_of(out)))
    code, text = finish(out, "--ranks", "2")
    assert (code, "another call, or a row that one left behind, is still running" in text) == (2, True)
    script.send_signal(signal.SIGTERM)
    script.communicate(timeout=60)
    assert script.returncode == 143
    until(lambda: not processes_of(out), 20, lambda: str(processes_of(out)))
    assert not list((out / "failed").iterdir())
    before = (out / "scaling/exact-float32-cp2.json").stat().st_mtime_ns
    code, text = finish(out, "--ranks", "2")
    assert (code, "exact-float32" in text, "train/1k-dp2" in text) == (0, False, True), text
    assert (out / "scaling/exact-float32-cp2.json").stat().st_mtime_ns == before
    return out


def check(out: Path, ranks: int, rows: set[str]) -> None:
    """All that the rows must have found."""
    names = {name.format(n=ranks) for name in rows}
    assert set((out / "rows.txt").read_text().split()) == names
    assert {f"{kind}/{name}" for kind in ("scaling", "layouts", "train") for name in results(out, kind)} == names
    scaling = results(out, "scaling")
    for dtype in ("bfloat16", "float32"):
        of = scaling[f"exact-{dtype}-cp{ranks}"]
        assert (of["config"]["cp"], of["environment"]["ranks"], of["config"]["dtype"]) == (ranks, ranks, dtype)
        assert len(of["check"]["alone"]) == 3 * 2 * 4  # exchanges, attentions, output and gradients
        assert all(error <= layer.ROUNDING * of["check"]["alone"][k] for k, error in of["check"]["errors"].items()
                   if "selection" not in k)  # fmt: skip
        assert [of["check"]["errors"][f"{exchange} selection"] for exchange in ("ring", "allgather", "ulysses")] == [
            0
        ] * 3
        assert "exchanges" not in of
    timed = scaling[f"1k-cp{ranks}"]
    assert all(timed["exchanges"]["ring"][kind]["forward"]["p50_ms"] > 0 for kind in ("lighthouse", "dense"))
    runs = results(out, "layouts")[f"float64-x{ranks}"]["runs"]
    assert {(run["dp"], run["cp"]) for run in runs} == {(ranks // cp, cp) for cp in (1, 2, 4) if ranks % cp == 0}
    assert all(max(run["errors"].values()) <= 1e-9 for run in runs)
    assert all(len(run["losses"]) == len(run["grad_norms"]) == 4 for run in runs)
    (over,) = results(out, "train")[f"1k-cp{ranks}"]["modes"].values()
    (alone,) = results(out, "train")[f"1k-dp{ranks}"]["modes"].values()
    assert over["losses"] == pytest.approx(alone["losses"], rel=1e-4)


def test_two_processes(two: Path) -> None:
    check(two, 2, ROWS)
    text = (two / "multi_gpu.md").read_text()
    assert "Missing" not in text
    assert "- One layer in bfloat16 over 2 ranks: errors at most 1." in text
    assert text.startswith(
        "# Several GPUs\n\nSome rows are of CPU processes, which share cores: their times say nothing.\n"
    )
    for header in ("compute ms, alone", "times as fast", "loss, first", "tokens/s/GPU", "NVLink 4, exposed %"):
        assert header in text


def test_toy_rows_are_not_taken_for_real_ones(two: Path) -> None:
    done = subprocess.run(
        [str(SCRIPT), str(two)], env=ENV | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.startswith("error: --ranks 0: must be")) == (2, True)
    (two / "size.txt").write_text("full\n")
    code, text = finish(two, "--ranks", "2")
    (two / "size.txt").write_text("toy\n")
    assert (code, "holds rows of the other size" in text) == (2, True)


def test_four_processes(tmp_path: Path) -> None:
    code, text = finish(tmp_path / "four", "--ranks", "4")
    assert code == 0, text
    check(tmp_path / "four", 4, ROWS | OF_FOUR)


def test_a_row_that_failed_is_not_run_again(two: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(two, out)
    (out / "logs/layouts-float64-x2.log").unlink()  # as of a check that failed
    shutil.rmtree(out / "data")
    (out / "data").mkdir()
    code, text = finish(out, "--ranks", "2")
    assert code == 1
    assert "layouts/float64-x2: failed with 2 after" in text
    assert "\nerror: no dataset in " in text
    assert "- layouts/float64-x2: failed: see failed/layouts-float64-x2.log" in (out / "multi_gpu.md").read_text()
    code, text = finish(out, "--ranks", "2")
    assert (code, "layouts/float64-x2: failed before; see" in text) == (1, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "3"], "error: --ranks 3: must be 2, 4 or 8 (this machine has 0 GPUs)"),
        (["--minutes", "soon"], "error: --minutes soon: must be a whole number from 1 on"),
        (["--rank", "2"], "error: --rank: no such option; usage: "),
        (["--ranks"], "error: --ranks takes a value; usage: "),
        (["--data", "nowhere"], "error: --data nowhere: no such folder"),
    ],
)
def test_wrong_arguments(words: Sequence[str], message: str, tmp_path: Path) -> None:
    code, text = finish(tmp_path / "out", *words)
    assert (code, text.startswith(message)) == (2, True), text
