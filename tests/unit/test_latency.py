"""`benchmarks.latency`: lengths with their topk, stages and their bytes, the merged report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import latency, latency_report, layer, stages
from benchmarks.common import write_json
from lhcp.attention import LighthouseConfig, select
from lhcp.kernels.lighthouse import reference

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    values = {
        "output_dir": str(folder / "run"), "seq_len": 1024, "global_batch_size": 1, "device": "cpu",
        "model": {"preset": "tiny", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
        "data": {"path": "none"}, "attention": {"topk": 32, "num_strata": 8},
        "stages": [{"mode": "dense", "steps": 1}],
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


@pytest.fixture(scope="module")
def result_file(config_file: Path) -> Path:
    out = config_file.parent / "result.json"
    overrides = ["--set", "attention.max_cp=4", "--repeats", "1", "--seq-lens", "512,1024", "--scale-topk"]
    assert latency.main([str(config_file), "--out", str(out), *overrides]) == 0
    return out


def test_topk_is_in_proportion(result_file: Path) -> None:
    found = json.loads(result_file.read_text())["lengths"]
    assert [(at["seq_len"], at["attention"]["topk"], at["subsequence_length"]) for at in found] == [
        (512, 16, 160),
        (1024, 32, 320),
    ]
    assert all(at["attention"]["num_strata"] == 8 for at in found)
    for at in found:
        assert set(at["stages"]) == {*stages.FORWARD, *stages.BACKWARD}
        assert all(stage["p50_ms"] > 0 < stage["floor_ms"] for stage in at["stages"].values())
        # Never more than the stages move, which hand more to each other.
        for kind, names in {"forward": stages.FORWARD, "forward_backward": at["stages"]}.items():
            assert 0 < at["floor_ms"][kind] < sum(at["stages"][name]["floor_ms"] for name in names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scale-topk"], "--scale-topk needs --seq-lens"),
        (
            ["--seq-lens", "48", "--scale-topk"],
            "--scale-topk: topk 32 at 1024 tokens is no whole number at 48; nearest legal: 32 or 64",
        ),
    ],
)
def test_proportions_that_are_refused(
    words: list[str], message: str, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latency.main([str(config_file), "--out", str(tmp_path / "x.json"), *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize(("levels", "p", "topk", "strata"), [(2, 4, 16, 2), (3, 4, 16, 2), (4, 2, 24, 2)])
def test_bytes_are_those_of_the_rows_that_are_touched(levels: int, p: int, topk: int, strata: int) -> None:
    """Counted one by one from a real selection, each row once however often it is read."""
    config = LighthouseConfig(num_levels=levels, pooling_factor=p, topk=topk, num_strata=strata)
    q, k = torch.randn(1, 512, 4, 8), torch.randn(1, 512, 2, 8)
    sel = select(q, k, config)
    shape = sel.pyramid
    rows = sel.entries[0, 0]
    level, index = shape.unflatten(rows)
    first = min(2, levels - 1)
    tokens = {int(i) for i in index[level == 0]}
    if levels > 2:
        tokens |= {int(i) * p + j for i in index[level == 1] for j in range(p)}
    read = int((level >= first).sum()) + len(tokens)
    stored = sum(shape.sizes[first:])
    row, index_bytes = (4 + 2 + 2) * 8 * 4, 2 * 4
    moved = stages.stage_bytes(shape, topk, len(rows), (q, k, k))
    assert moved["pool and score"] == (512 + stored) * row + 2 * index_bytes * sum(shape.sizes[1:])
    assert moved["gather"] == (read + len(rows)) * row + index_bytes * len(rows)
    assert moved["scatter back"] == (len(rows) + 512) * row // 2 + index_bytes * shape.offsets[-1]
    least = stages.least_bytes(shape, len(rows), (q, k, k))
    # q, k, v in, the output out; the sub-sequence out, its output in.
    assert least["forward"] == (512 + len(rows)) * (row + row // 2)
    assert moved["gather, backward"] == (len(rows) + 512) * row + index_bytes * shape.offsets[-1]


def test_nothing_is_timed_where_scores_are_wrong(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In float32 alone: in float64, where the expected selection is made, they are right."""
    honest = reference.row_norms

    def wrong(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
        norms = honest(x, num_kv_heads)
        return norms if norms.dtype == torch.float64 else norms.flip(-1)

    monkeypatch.setattr(reference, "row_norms", wrong)
    assert latency.main([str(config_file), "--out", str(tmp_path / "x.json"), "--seq-lens", "1024"]) == 1
    assert "check failed against one process in float64, N = 1,024: selection " in capsys.readouterr().err


def test_nothing_is_timed_where_the_kernels_differ_from_plain_pytorch(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A selection with two candidates exchanged, in kernels that are otherwise plain PyTorch."""

    class Wrong:
        def __getattr__(self, name: str) -> Any:
            return getattr(reference, name)

        def select(self, *arguments: Any) -> torch.Tensor:
            return reference.select(*arguments).flip(-1)

    wrong = Wrong()
    for module in (latency, layer):
        monkeypatch.setattr(module, "kernels_for", lambda x: wrong)
    out = tmp_path / "x.json"
    assert latency.main([str(config_file), "--out", str(out), "--seq-lens", "1024"]) == 1
    assert "ms" not in out.read_text()
    error = capsys.readouterr().err
    assert error.startswith("error: check failed against plain PyTorch, N = 1,024: selection ")


def test_report_merges_and_draws(result_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = json.loads(result_file.read_text())
    longest = other["lengths"].pop()
    longest["seq_len"] = 4096
    longest["attention"]["num_levels"] = 4
    write_json(tmp_path / "other.json", other | {"lengths": [longest]})
    name = tmp_path / "made" / "latency"
    assert latency_report.main([str(tmp_path / "other.json"), str(result_file), "--out", str(name)]) == 0
    text = capsys.readouterr().out
    assert name.with_suffix(".md").read_text() == text
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if "|" in line]
    assert [(row[0], row[1]) for row in rows[2:5]] == [
        ("512", "L3 p4 k16"),
        ("1,024", "L3 p4 k32"),
        ("4,096", "L4 p4 k32"),
    ]
    assert [row[1] for row in rows if row[0] == "4,096"][1:] == [*stages.FORWARD, *stages.BACKWARD, "all stages"]
    assert name.with_suffix(".png").read_bytes().startswith(PNG)


def test_report_refuses(result_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(result_file.read_text())
    write_json(tmp_path / "b200.json", result | {"environment": result["environment"] | {"devices": ["NVIDIA B200"]}})
    write_json(tmp_path / "failed.json", {key: value for key, value in result.items() if key != "lengths"})
    write_json(tmp_path / "again.json", result)
    old = [{key: value for key, value in at.items() if key != "around"} for at in result["lengths"]]
    write_json(tmp_path / "old.json", result | {"lengths": old})
    write_json(tmp_path / "scaling.json", {"benchmark": "scaling"})
    (tmp_path / "torn.json").write_text("{")
    out = ["--out", str(tmp_path / "report")]
    for file, message in {
        "b200.json": f"devices: {result['environment']['devices']} in {result_file}, ['NVIDIA B200'] in ",
        "failed.json": "nothing was timed, since its check failed; leave it out",
        "old.json": "is of another version of benchmarks.latency (KeyError('around')); measure again",
        "again.json": "512 tokens at L=3, p=4, k=N/32 are in the results 2 times; leave all but one out",
        "scaling.json": "is not a result of benchmarks.latency",
        "torn.json": "cannot be read",
        "absent.json": "cannot be read",
    }.items():
        assert latency_report.main([str(result_file), str(tmp_path / file), *out]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "report.md").exists()
