"""The benchmarks' reports, lengths and correctness check, in one process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import latency, layer, recoverability, scaling, shares
from benchmarks.common import table, timed, write_json
from benchmarks.layer import Layer, complaint, shortened
from benchmarks.scaling_report import tables
from lhcp.config import ConfigError, LighthouseConfig
from lhcp.distributed import ContextParallel
from lhcp.distributed.link import Transfer

CPU = torch.device("cpu")
SMALL = Layer(num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32", device=CPU)
ATTENTION = LighthouseConfig(num_levels=3, pooling_factor=4, topk=16, num_strata=4)


def result(seq_len: int = 8192, cp: int = 2, **changes: Any) -> dict[str, Any]:
    """What `scaling` writes, as far as a report reads it."""
    times = {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0}
    measured = {
        "forward": times, "forward_backward": times | {"p50_ms": 6.0}, "peak_memory_gib": 1.5,
        "tokens_per_s_per_rank": 1e6 / cp, "bytes": {"forward": 2_000_000, "backward": 5_000_000},
        "compute_ms": {"forward": 1.6, "forward_backward": 5.0},
        "host_ms": {"forward": 0.5, "forward_backward": 1.5},
        "exposed_ms": {"forward": 0.4, "forward_backward": 1.0},
        "hop_gb_per_s": 155.42,
    }  # fmt: skip
    return {
        "benchmark": "scaling",
        "emulated": False,
        "config": {"seq_len": seq_len, "cp": cp, "dtype": "bfloat16"},
        "check": {"passed": True},
        "environment": {"devices": ["NVIDIA B200"], "dtype": "bfloat16", "versions": {"torch": "2.11.0"}},
        "one_device": {"lighthouse": {"forward": 3.2, "forward_backward": 10.0}},
        "exchanges": {"ring": {"lighthouse": measured}},
    } | changes


def emulated_result() -> dict[str, Any]:
    """Of two ranks, one of which computes for longer."""
    exposed = {"forward": 0.2, "forward_backward": 0.6}
    times = {
        "compute_ms": {"forward": {"0": 1.0, "1": 3.0}, "forward_backward": {"0": 6.0, "1": 6.0}},
        "host_ms": {"forward": 0.5, "forward_backward": 1.5},
        "peak_memory_gib": 1.5,
        "bytes": {"forward": 1_000_000, "backward": 3_000_000},
        "projected_exposed_ms": {"NVLink 4": {"1.0": exposed, "2.0": exposed}, "InfiniBand NDR": {"1.0": exposed}},
    }
    one_device = {"dense": {"forward": 5.0, "forward_backward": 10.0}}
    return result(emulated=True, one_device=one_device, exchanges={"ulysses": {"dense": times}})


def test_a_table_is_aligned_markdown() -> None:
    assert table(["name", "ms"], [["a", "12.5"], ["longer", "1.0"]]) == (
        "| name   |   ms |\n| ------ | ---: |\n| a      | 12.5 |\n| longer |  1.0 |\n"
    )


def test_json_is_written_whole_and_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": [1.5, math.nan], "b": {"c": math.inf}})
    assert json.loads(path.read_text()) == {"a": [1.5, None], "b": {"c": None}}
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(ConfigError, match=r"x.json/y.json cannot be written \(.+\); choose another place"):
        write_json(path / "y.json", {})


def test_times_are_percentiles_after_a_warm_up() -> None:
    calls: list[int] = []
    found = timed(lambda: calls.append(0), CPU, 4)
    assert len(calls) == 6
    assert 0 < found["p20_ms"] <= found["p50_ms"] <= found["p80_ms"] < 1000


def test_a_hop_is_of_keys_and_values_from_post_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens, 2 heads of 8, float32: 8,192 bytes, in half a millisecond."""
    sent: list[int] = []

    class Link:
        def post(self, *transfers: Transfer) -> None:
            sent.extend(transfer.send.nbytes for transfer in transfers if transfer.send is not None)

        def wait(self) -> None:
            sent.append(-1)

    class Communicator:
        def link(self) -> Link:
            return Link()

    def in_half_a_millisecond(call: Callable[[], None], device: torch.device, repeats: int) -> dict[str, float]:
        for _ in range(repeats):
            call()
        return {"p50_ms": 0.5}

    monkeypatch.setattr(shares, "timed", in_half_a_millisecond)
    rate = shares._hop(Communicator(), SMALL, 64, repeats=2)
    assert sent == [8192, -1, 8192, -1]
    assert rate == pytest.approx(8192 / 0.5e-3 / 1e9)


def test_scaling_report_sorts_and_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, found in {"a": result(16384), "b": result(cp=4), "c": result(), "d": emulated_result()}.items():
        write_json(tmp_path / f"{name}.json", found)
    write_json(tmp_path / "latency.json", {"benchmark": "latency"})
    (tmp_path / "names").write_text("a\nb\n\nc\n")
    assert scaling.main(["report", str(tmp_path), "--expect", str(tmp_path / "names")]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "scaling.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if "|" in line]
    # Time of one device over cp: 1.6 / 5.0 at 2 ranks, 0.8 / 2.5 at 4.
    times = ["ring", "lighthouse", "2.00 / 6.00", "1.60 / 5.00", "0.50 / 1.50", "25.0 / 20.0"]
    assert rows[2:5] == [
        ["c", "8,192", "2", *times, "25.0 / 20.0", "500,000", "2.0 / 7.0", "155.4", "1.50"],
        ["b", "8,192", "4", *times, "150.0 / 140.0", "250,000", "2.0 / 7.0", "155.4", "1.50"],
        ["a", "16,384", "2", *times, "25.0 / 20.0", "500,000", "2.0 / 7.0", "155.4", "1.50"],
    ]
    assert rows[7:] == [
        ["d", "8,192", "2", "ulysses", "dense", "3.00 / 6.00", "0.50 / 1.50", "1.000", "20.0 / 20.0",
         "1.0 / 4.0", "1.50", "10.0 / 10.0", "10.0"],
    ]  # fmt: skip
    assert "Measured on NVIDIA B200 in bfloat16, torch 2.11.0." in text
    assert "Left out, since not a result of this benchmark: latency.json." in text
    assert "Missing" not in text


def test_scaling_report_puts_projected_beside_measured_and_dense_beside_lighthouse() -> None:
    times = result()["exchanges"]["ring"]["lighthouse"]
    dense = times | {"forward": {"p50_ms": 5.0}, "forward_backward": {"p50_ms": 30.0}}
    measured = result(exchanges={"ring": {"lighthouse": times, "dense": dense}})
    measured["one_device"]["dense"] = measured["one_device"]["lighthouse"]
    alone = emulated_result()["exchanges"]["ulysses"]["dense"]
    emulated = result(emulated=True, exchanges={"ring": {"lighthouse": alone}})
    emulated["exchanges"]["ring"]["lighthouse"]["projected_exposed_ms"]["NVLink 4"] = {
        factor: {"forward": 0.2, "forward_backward": ms} for factor, ms in (("0.5", 1.2), ("1.0", 0.6), ("2.0", 0.3))
    }
    text = tables({"m": measured, "e": emulated, "other length": result(16384)})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    assert ["m", "8,192", "2", "ring", "2.00 / 6.00", "5.00 / 30.00", "2.5 / 5.0"] in lines
    beside = lines[[line[5:6] for line in lines].index(["compute ms, alone"]) + 2 :]
    assert beside == [
        ["m", "8,192", "2", "ring", "lighthouse", "3.00 / 6.00", "1.60 / 5.00", "20.0 / 10.0 / 5.0", "20.0",
         "3.20 / 6.60", "2.00 / 6.00"],
    ]  # fmt: skip


def test_scaling_report_says_how_exact(tmp_path: Path) -> None:
    parts = [f"{kind} {part}" for kind in ("lighthouse", "dense") for part in ("out", "dq", "dk", "dv")]
    check = {
        "passed": True, "length": 2048,
        "errors": {"ring selection": 0.0} | {f"ring {part}": 3e-3 for part in parts},
        "alone": {f"ring {part}": 2e-3 for part in parts},
    }  # fmt: skip
    checked = {key: value for key, value in result(check=check).items() if key not in ("exchanges", "one_device")}
    write_json(tmp_path / "exact.json", checked)
    text = tables({"exact": checked})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    where = ["exact", "2,048", "2", "bfloat16", "ring"]
    assert lines[2:] == [
        [*where, "lighthouse", "0", *["3.0e-03 (1.50)"] * 4],
        [*where, "dense", "-", *["3.0e-03 (1.50)"] * 4],
    ]
    assert scaling.main(["report", str(tmp_path)]) == 0


def test_scaling_report_names_what_is_missing_or_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = {"passed": False, "against": "one process in float32", "length": 2048,
             "errors": {"lighthouse dk": 0.25, "dense dq": None, "dense dk": 1e-7},
             "tolerances": {"lighthouse dk": 1e-5, "dense dq": 1e-5, "dense dk": 1e-5}}  # fmt: skip
    write_json(tmp_path / "good.json", result())
    write_json(tmp_path / "wrong.json", {"benchmark": "scaling", "emulated": False, "check": check})
    write_json(tmp_path / "nothing.json", result(exchanges={}))
    write_json(tmp_path / "old.json", {key: value for key, value in result().items() if key != "emulated"})
    write_json(tmp_path / "foreign.json", {"benchmark": "latency"})
    (tmp_path / "torn.json").write_text('{"benchmark": "scal')
    write_json(tmp_path / "partial.json", {key: value for key, value in result().items() if key != "one_device"})
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "names").write_text("good\nwrong\nforeign\nabsent\n")
    assert scaling.main(["report", str(tmp_path), "--expect", str(tmp_path / "names")]) == 1
    problems = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    assert problems[:3] == [
        "- wrong: check failed against one process in float32, N = 2,048: lighthouse dk 0.25 (at most 1e-05), "
        "dense dq inf (at most 1e-05)",
        "- foreign: foreign.json is not a result of this benchmark",
        "- absent: no result: see its log",
    ]
    assert [line.split(" (")[0] for line in problems[3:]] == [
        "- nothing: nothing.json is damaged",
        "- old: old.json is a result of another version; measure again",
        "- partial: partial.json is damaged",
        "- torn: torn.json is damaged",
    ]


@pytest.mark.parametrize("program", [scaling, recoverability])
def test_a_report_on_nothing(program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["report", str(tmp_path)]) == 1
    assert program.main(["report", str(tmp_path / "no")]) == 2
    assert program.main(["report", str(tmp_path), "--expect", str(tmp_path / "no")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: {tmp_path}/no: no such folder; name the one that holds the results"
    assert second.startswith(f"error: --expect {tmp_path}/no cannot be read")


@pytest.mark.parametrize("num_chunks", [1, 2, 8, 16])
@pytest.mark.parametrize("changes", [{}, {"num_levels": 4, "topk": 4096}, {"scorer": "dilated", "dilation": 5}])
def test_the_check_is_short_and_legal(changes: dict[str, Any], num_chunks: int) -> None:
    config = LighthouseConfig(**{"num_levels": 3, "pooling_factor": 4, "topk": 1536} | changes)
    seq_len = 1_048_576 if config.scorer != "dilated" else 5 * 2**17
    config = config.resolve(seq_len, num_chunks)
    length, small = shortened(config, seq_len, num_chunks)
    assert small == small.resolve(length, num_chunks)
    assert length <= 4 * layer.SHORT
    kept = ("num_levels", "pooling_factor", "scorer", "dilation", "cover_prefix")
    assert all(getattr(small, name) == getattr(config, name) for name in kept)
    assert small.topk < length // small.coarsest_window  # something is left out, so selections can differ


def test_a_short_sequence_is_checked_as_it_is() -> None:
    assert shortened(ATTENTION, 512, 2) == (512, ATTENTION)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_check_passes(dtype: str) -> None:
    small = Layer(4, 2, 8, dtype, CPU)
    found = layer.check(small, 512, ATTENTION, ContextParallel(), layer.sdpa, "auto")
    assert found["passed"]
    assert found["against"] == "one process in float64"
    assert len(found["errors"]) == 9
    assert max(found["errors"].values()) > 0  # the reference is another computation


def test_ranks_may_err_twice_as_much_as_one_process() -> None:
    alone = {"dense out": 1e-3}
    for error, passed in ((1.99e-3, True), (2.01e-3, False), (math.inf, False)):
        found = {"errors": {"selection": 0.0, "dense out": error}, "alone": alone, "attention": {"scorer": "norm"}}
        quiet = {"errors": {"selection": 0.0, "dense out": 0.0}, "alone": alone, "attention": {"scorer": "norm"}}
        of_all = layer.worst(Layer(4, 2, 8, "bfloat16", CPU), [quiet, found])
        assert (of_all["passed"], of_all["errors"]["dense out"]) == (passed, error)
    broken = {"errors": {"selection": 0.0, "dense out": math.inf}, "alone": {"dense out": math.inf},
              "attention": {"scorer": "norm"}}  # fmt: skip
    assert not layer.worst(SMALL, [broken])["passed"]
    flipped = {"errors": {"selection": 1e-3, "dense out": 0.0}, "alone": alone, "attention": {"scorer": "norm"}}
    assert not layer.worst(SMALL, [flipped])["passed"]
    exact = {
        "errors": {"selection": 0.0, "dense out": 1e-9},
        "alone": {"dense out": 0.0},
        "attention": {"scorer": "norm"},
    }
    assert not layer.worst(Layer(4, 2, 8, "float64", CPU), [exact])["passed"]


def test_the_check_fails_where_a_gradient_is_wrong() -> None:
    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return layer.sdpa(q, k.detach() + 1e-3 * (k - k.detach()), v)

    found = layer.check(SMALL, 512, ATTENTION, ContextParallel(), wrong, "auto")
    assert not found["passed"]
    assert complaint(found).startswith(
        "check failed against one process in float64, N = 512: dense dk 1 (at most 1e-05)"
    )


def test_the_check_fails_where_a_value_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = layer.lighthouse_attention

    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        out = honest(*arguments, **options)
        return out if out.dtype == torch.float64 else out * math.nan

    monkeypatch.setattr(layer, "lighthouse_attention", wrong)
    found = layer.check(SMALL, 512, ATTENTION, ContextParallel(), layer.sdpa, "auto")
    assert not found["passed"]
    assert "lighthouse out inf" in complaint(found)


def test_latency_lengths() -> None:
    config = LighthouseConfig(num_levels=3, pooling_factor=4, topk=192, num_strata=8)
    assert latency.default_lengths(config, 8192) == [3072, 6144, 8192]
    assert latency.default_lengths(config, 3072 * 2**9) == [3072 * 2**i for i in range(2, 10)]
    assert latency.default_lengths(config, 3072) == [3072]


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    values = {
        "output_dir": str(tmp_path / "run"), "seq_len": 512, "global_batch_size": 1, "device": "cpu",
        "model": {"preset": "tiny", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}, "parallel": {"cp": 4},
        "data": {"path": "none"}, "attention": {"topk": 16, "num_strata": 8},
        "stages": [{"mode": "lighthouse", "steps": 40}, {"mode": "dense", "steps": 60}],
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


def test_latency_measures(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert latency.main([str(config_file), "--out", str(out), "--repeats", "2"]) == 0
    found = json.loads(out.read_text())
    assert [(at["seq_len"], at["subsequence_length"]) for at in found["lengths"]] == [(256, 144), (512, 160)]
    assert all(at["ratio"]["forward_backward"] > 0 for at in found["lengths"])
    assert found["environment"]["versions"]["torch"] == torch.__version__
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:4]] == ["256", "512"]


def test_latency_tells_no_speed_when_wrong(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    out.write_text("of an earlier attempt")
    monkeypatch.setitem(layer.TOLERANCE, "float32", 1e-9)
    assert latency.main([str(config_file), "--out", str(out)]) == 1
    assert "ms" not in out.read_text()
    assert not json.loads(out.read_text())["check"]["passed"]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: check failed against one process in float64, N = 512: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seq-lens", "256,300"], "seq_len 300 is not a multiple of"),
        (["--seq-lens", "256,x"], "--seq-lens '256,x': must be numbers of tokens"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--set", "parallel.block_backend=cudnn"], "block_backend 'cudnn' takes float16 or bfloat16 on CUDA"),
    ],
)
def test_latency_refuses(
    words: list[str], message: str, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latency.main([str(config_file), "--out", str(tmp_path / "out.json"), *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
