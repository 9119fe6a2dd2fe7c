"""What `benchmarks/multi_gpu.sh` reports, and when losses of two layouts are the same."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import multi_gpu_report
from benchmarks.common import write_json
from benchmarks.layouts import Curve, complaint, judged

RESULTS = Path(multi_gpu_report.__file__).parent / "results"

ENVIRONMENT = {
    "devices": ["NVIDIA B200"], "dtype": "float64", "ranks": 2, "versions": {"torch": "2.11.0", "nccl": "2.28.3"},
    "nccl_settings": {"NCCL_NVLS_ENABLE": "0"},
}  # fmt: skip


def curve(last: float = 3.0, grad_norm: float = 2.0, offset: float = 0.0) -> Curve:
    losses = [loss + offset for loss in (5.0, 4.0, last)]
    return {"losses": losses, "grad_norms": [1.0, 1.5, grad_norm]}


EXACT = curve()


def layouts_result(**changes: Any) -> dict[str, Any]:
    found = judged("float64", EXACT, [(2, 1), (1, 2)], [EXACT, curve(3.0 + 1e-12)])
    return {"benchmark": "layouts", "environment": ENVIRONMENT, **found, **changes}


def train_result(dp: int, cp: int, speed: float) -> dict[str, Any]:
    found = {
        "memory": {"recompute": "selective", "recompute_layers": None, "offload_layers": 0}, "mfu": 0.4,
        "step": {"p50_ms": 4000.0}, "tokens_per_s_per_gpu": speed, "gpu_gib": 40.0, "offloaded_gib": 0.0,
        "by_rank": [{"transfers_ms": {"all": 300.0, "exposed": ms}} for ms in (80.4, 19.6)],
    }  # fmt: skip
    config = {"seq_len": 1048576, "parallel": {"dp": dp, "cp": cp}}
    return {
        "benchmark": "train_step", "config": config, "environment": ENVIRONMENT, "check": {"passed": True},
        "modes": {"lighthouse": found},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.txt").write_text("layouts/float64\nscaling/1m-cp2\ntrain/1m-cp2\ntrain/1m-dp2\n")
    write_json(tmp_path / "layouts/float64.json", layouts_result())
    write_json(tmp_path / "train/1m-dp2.json", train_result(2, 1, 134_000.0))
    write_json(tmp_path / "train/1m-cp2.json", train_result(1, 2, 130_000.0))
    return tmp_path


def report(folder: Path) -> tuple[int, str]:
    code = multi_gpu_report.main([str(folder)])
    return code, (folder / "multi_gpu.md").read_text()


def test_rows_that_are_left_are_named(folder: Path) -> None:
    code, text = report(folder)
    assert code == 0
    assert "- scaling/1m-cp2: not measured yet\n" in text
    exact = "- Runs in float64 at every layout of 2 ranks, against one process in float64: losses within 3.3e-13, "
    assert f"{exact}gradient norms within 0.0e+00.\n" in text
    speed = "- Whole Lighthouse steps on 2 GPUs, 2 a sequence: 130,000 tokens/s/GPU"
    assert f"{speed}, 3.1% more time a token than with one each.\n" in text
    assert "In the environment: NCCL_NVLS_ENABLE=0." in text
    assert [line.split("|")[-2].strip() for line in text.splitlines() if "| selective |" in line] == ["80 / 20"] * 2
    assert "times say nothing" not in text
    assert "another version" not in text
    other = train_result(2, 1, 134_000.0)
    other["modes"]["lighthouse"]["memory"]["offload_layers"] = 28
    write_json(folder / "train/1m-dp2.json", other | {"environment": ENVIRONMENT | {"code": "abc"}})
    assert "3.1% more time a token than with one each, which recompute otherwise.\n" in report(folder)[1]
    assert "Of another version of the code than the rest: train/1m-dp2." in report(folder)[1]
    write_json(folder / "train/1m-dp2.json", train_result(1, 1, 134_000.0))  # of one GPU, whatever its clock
    assert f"{speed}.\n" in report(folder)[1]


def test_what_is_wrong_or_damaged_is_named(folder: Path) -> None:
    write_json(folder / "layouts/float64.json", layouts_result(**judged("float64", EXACT, [(2, 1)], [curve(3.1)])))
    (folder / "train/1m-cp2.json").write_text("{")
    (folder / "scaling").mkdir()
    (folder / "scaling/1m-cp2.json").write_text("[]")
    code, text = report(folder)
    assert code == 1
    problems = [line.split(" (")[0] for line in text.splitlines() if line.startswith("- ") and ".json" in line]
    assert sorted(problems) == [
        "- layouts/float64: float64.json: a layout does not compute what one process does",
        "- scaling/1m-cp2: 1m-cp2.json is not a result of this benchmark",
        "- train/1m-cp2: 1m-cp2.json is damaged",
    ]
    assert "130,000" not in text
    assert text.count("; remove it to measure again\n") == 1


def test_a_row_that_failed_has_a_log(folder: Path) -> None:
    (folder / "failed").mkdir()
    (folder / "failed/scaling-1m-cp2.log").write_text("error: out of memory\n")
    code, text = report(folder)
    assert (code, "- scaling/1m-cp2: failed: see failed/scaling-1m-cp2.log\n" in text) == (1, True)


def test_results_of_other_rows_and_of_other_versions_are_no_rows(folder: Path) -> None:
    """A measured one of the old check, and one that is no row."""
    (folder / "scaling").mkdir()
    for name in ("1m-cp2", "unasked"):
        shutil.copy(RESULTS / "scaling/measured-1m-cp2.json", folder / f"scaling/{name}.json")
    code, text = report(folder)
    assert (code, "| 1m-cp2" in text, "unasked" in text) == (0, True, False)
    assert "One layer in" not in text
    assert (
        "- A Lighthouse layer of 1,048,576 tokens over 2 ranks by ring, forward and backward: 11.5% above a share of "
        "one device's time, of which transfers and the host add 3.2 points to what it computes alone.\n"
    ) in text


def test_another_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert multi_gpu_report.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path} has no rows.txt; name a folder of benchmarks/multi_gpu.sh\n"


def test_runs_in_float64_are_the_same() -> None:
    assert judged("float64", EXACT, [(1, 2)], [curve(3.0 + 1e-12)])["passed"]
    assert not judged("float64", EXACT, [(2, 1), (1, 2)], [EXACT, curve(3.0 + 1e-8)])["passed"]
    assert not judged("float64", EXACT, [(1, 2)], [curve(grad_norm=4.0)])["passed"]
    assert not judged("float64", EXACT, [(1, 2)], [curve(math.nan)])["passed"]
    with pytest.raises(ValueError, match="longer"):
        judged("float64", EXACT, [(1, 2)], [{"losses": [5.0], "grad_norms": [1.0]}])


def test_runs_in_bfloat16_stray_as_far_as_rounding_goes(tmp_path: Path) -> None:
    shapes = [(1, 1), (2, 1), (1, 2)]
    found = judged("bfloat16", EXACT, shapes, [curve(offset=1e-3), curve(offset=-1e-2), curve(grad_norm=2.05)])
    assert (found["passed"], complaint(found)) == (True, None)
    assert [run["errors"]["losses"] for run in found["runs"]] == pytest.approx([1e-3 / 3, 1e-2 / 3, 0])
    assert [run["errors"]["grad_norms"] for run in found["runs"]] == pytest.approx([0, 0, 0.025])
    for strays in (curve(offset=1.2e-2), curve(grad_norm=2.07), curve(math.nan), curve(grad_norm=math.nan)):
        found = judged("bfloat16", EXACT, shapes, [EXACT, EXACT, strays])
        assert (found["passed"], complaint(found)) == (False, "a layout does not compute what one process does")
        found = judged("bfloat16", EXACT, shapes, [strays, EXACT, EXACT])
        assert not found["passed"]
        write_json(tmp_path / "found.json", found)  # which has no number for what is none
        for result in (found, json.loads((tmp_path / "found.json").read_text())):
            assert "take a lower optim.lr" in str(complaint(result))
