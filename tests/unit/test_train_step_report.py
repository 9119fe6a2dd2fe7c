"""Reading a trace, and the reports of whole steps, on the results that are committed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plan_errors, step_parts, train_step_report
from benchmarks.step_parts import AROUND, ATTENTION, GEMM, IDLE, LOSS, OFFLOAD, OPTIMIZER, OTHER

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "train_step"
MEASURED = [RESULTS / f"{name}.json" for name in ("98k", "1m", "2m", "262k", "1b-131k")]


def kernel(name: str, start: float, duration: float, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": duration}


def test_a_trace_by_part() -> None:
    """Microseconds: 100 of a step, by a hand-made trace."""
    events = [
        {"ph": "M", "name": "process_name"},
        kernel("aten::mm", 0, 5, "cpu_op"),
        kernel("nvjet_sm90_tst_256x160", 0, 20),
        kernel("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 20, 10),
        kernel("_pool_kernel", 30, 4),
        kernel("triton_poi_fused_add", 34, 6),
        kernel("loss", 40, 20, "gpu_user_annotation"),
        kernel("nvjet_sm90_tst_192x192", 40, 12),
        kernel("triton_red_fused_exp", 52, 8),
        kernel("Memcpy DtoH (Device -> Pinned)", 10, 40, "gpu_memcpy"),  # beside compute
        kernel("Memcpy HtoD (Pinned -> Device)", 58, 12, "gpu_memcpy"),  # 10 of it alone
        kernel("Memcpy DtoD (Device -> Device)", 70, 5, "gpu_memcpy"),
        kernel("Optimizer.step#AdamW.step", 85, 15, "gpu_user_annotation"),
        kernel("multi_tensor_apply_kernel", 90, 10),
        kernel("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", 15, 18),  # beside compute
        kernel("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 76, 8),  # 8 of it alone
    ]
    found = step_parts.parts(events)
    assert found["parts_ms"] == pytest.approx({
        ATTENTION: 0.010, AROUND: 0.004, GEMM: 0.020, LOSS: 0.020, OPTIMIZER: 0.010, OFFLOAD: 0.010, OTHER: 0.011,
        IDLE: 0.007,
    })  # fmt: skip
    assert found["transfers_ms"] == pytest.approx({"all": 0.026, "exposed": 0.008})
    assert sum(found["parts_ms"].values()) + found["transfers_ms"]["exposed"] == pytest.approx(0.1)
    assert found["copies_ms"] == pytest.approx(0.052)
    assert found["kernels"][0] == {"name": "nvjet_sm90_tst_256x160", "calls": 1, "ms": pytest.approx(0.020)}


def test_the_report_of_the_committed_results(tmp_path: Path) -> None:
    name = tmp_path / "report"
    assert train_step_report.main([*map(str, MEASURED[:3]), "--out", str(name)]) == 0
    text = name.with_suffix(".md").read_text()
    assert text == (RESULTS / "train_step.md").read_text()
    assert name.with_suffix(".png").stat().st_size > 20_000
    results = [json.loads(path.read_text()) for path in MEASURED]
    for result in results:
        assert result["check"]["passed"]
        for found in result["modes"].values():
            assert sum(found["parts_ms"].values()) == pytest.approx(found["step"]["p50_ms"], rel=0.03)


def test_plans_are_as_right_as_they_are_said_to_be() -> None:
    """Within 10% of memory and 15% of time, wherever a plan says that memory suffices."""
    rows = [row for path in MEASURED for row in plan_errors.compare(path)]
    fitting = [row for row in rows if row["fits"]]
    assert len(rows) == 9
    assert [row["memory"]["recompute"] for row in rows if not row["fits"]] == ["none"]
    for row in fitting:
        assert abs(row["gpu_gib"]["error"]) < 0.1
        assert abs(row["step_s"]["error"]) < 0.15
        assert row["host_gib"]["plan"] == row["host_gib"]["measured"]


@pytest.mark.parametrize("module", [train_step_report, plan_errors])
def test_what_is_no_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], module: Any) -> None:
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "torn.json").write_text('{"benchmark": "train_st')
    failed = json.loads(MEASURED[1].read_text()) | {"modes": {}}
    (tmp_path / "failed.json").write_text(json.dumps(failed))
    for name in ("other.json", "torn.json", "failed.json", "none.json"):
        assert module.main([str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        assert name in capsys.readouterr().err
