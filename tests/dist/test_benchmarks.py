"""The scaling benchmark as it is started, and what it does when attention over ranks is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks import layer as layer_module
from benchmarks import scaling
from benchmarks.emulation import Alone, Network, Pass, _Recording, exposed_ms
from lhcp import config_file
from lhcp.distributed import ContextParallel
from lhcp.distributed.link import Transfer
from lhcp.volume import Attention, layer_bytes
from ranks import run_ranks

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    values = {
        "output_dir": str(tmp_path / "run"), "seq_len": 512, "global_batch_size": 2, "device": "cpu",
        "model": {"preset": "tiny", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}, "parallel": {"cp": 2},
        "data": {"path": "none"}, "attention": {"topk": 16, "num_strata": 8},
        "stages": [{"mode": "dense", "steps": 1}],
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


def start(nproc: int, *words: str | Path) -> subprocess.CompletedProcess[str]:
    agent = [sys.executable, "-m", "lhcp.agent", "--standalone", f"--nproc-per-node={nproc}"]
    return subprocess.run(
        [*agent, "-m", "benchmarks.scaling", *map(str, words)], capture_output=True, text=True, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=REPOSITORY,
    )  # fmt: skip


def test_ranks_check_and_measure(config: Path, tmp_path: Path) -> None:
    """Two groups of two ranks, side by side; no stage of the run uses Lighthouse."""
    out = tmp_path / "sweep" / "n512-cp2.json"
    exchanges = ("ring", "allgather", "ulysses")
    flags = ("--repeats", "2", "--exchanges", ",".join(exchanges))
    done = start(4, config, "--out", out, *flags, "--set", "compute_dtype=float64")
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert {key: found["config"][key] for key in ("seq_len", "dp", "cp", "dtype")} == {
        "seq_len": 512, "dp": 2, "cp": 2, "dtype": "float64",
    }  # fmt: skip
    check = found["check"]
    assert (check["passed"], check["against"], check["length"]) == (True, "one process in float64", 512)
    assert 0 < max(check["errors"].values()) <= 1e-10
    assert [check["errors"][f"{exchange} selection"] for exchange in exchanges] == [0, 0, 0]
    assert tuple(found["exchanges"]) == exchanges
    for exchange, of_exchange in found["exchanges"].items():
        for kind in ("lighthouse", "dense"):
            times = of_exchange[kind]
            assert ("hop_gb_per_s" in times) is (exchange == "ring")
            assert 0 < times["peak_memory_gib"] < 4
            assert times["tokens_per_s_per_rank"] == pytest.approx(256 / times["forward_backward"]["p50_ms"] * 1e3)
            for direction in ("forward", "forward_backward"):
                assert times["compute_ms"][direction] > 0
                total = times["compute_ms"][direction] + times["exposed_ms"][direction]
                assert total == pytest.approx(times[direction]["p50_ms"])
                assert found["one_device"][kind][direction] > 0
    assert found["environment"]["ranks"] == 4
    assert done.stdout.splitlines()[2].split()[1:10:2] == ["n512-cp2", "512", "2", "ring", "lighthouse"]
    assert list(out.parent.iterdir()) == [out]


def test_a_wrong_configuration_is_one_message(config: Path, tmp_path: Path) -> None:
    done = start(2, config, "--out", tmp_path / "out.json", "--set", "attention.num_strata=2")
    assert done.returncode == 2
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1
    assert "num_strata 2 is not legal" in messages[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("with_dense", [True, False])
def test_no_speed_without_the_halo(config: Path, with_dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContextParallel, "halo", lambda self, rows: torch.zeros_like(rows))
    resolved = config_file.load(config).resolve(2)

    def rank_main(rank: int) -> dict[str, Any]:
        return scaling.measure(resolved, ["ring"], torch.device("cpu"), 1, with_dense)

    for found in run_ranks(2, rank_main):
        assert not found["check"]["passed"]
        assert found["check"]["errors"]["ring lighthouse out"] > 1e-3
        assert found["check"]["errors"]["ring dense out"] < 1e-5
        assert not {"one_device", "exchanges"} & found.keys()


def test_a_failed_check_is_written_and_ends_with_1(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scaling.layers, "TOLERANCE", {"float32": 1e-9})
    out = tmp_path / "out.json"
    assert scaling.main([str(config), "--out", str(out), "--set", "parallel.cp=1"]) == 1
    assert "nothing was timed" in capsys.readouterr().err
    assert "p50_ms" not in out.read_text()
    assert scaling.main(["report", str(tmp_path)]) == 1
    assert "- out: check failed against one process in float64, N = 512: " in capsys.readouterr().out


def test_ranks_are_emulated_in_one_process(config: Path, tmp_path: Path) -> None:
    """Checked with threads as ranks; each rank's share alone; bytes are those that the shares hand to transfers."""
    out = tmp_path / "emulated.json"
    command = [str(config), "--emulate", "4", "--out", str(out), "--repeats", "1", "--exchanges", "allgather,ulysses"]
    assert scaling.main(command) == 0
    found = json.loads(out.read_text())
    assert found["emulated"]
    assert found["check"]["passed"]
    assert found["config"]["cp"] == 4
    of = Attention(4, 2, 8, 4)
    resolved = config_file.load(config).attention.resolve(512)
    for exchange, of_exchange in found["exchanges"].items():
        sparse, dense = of_exchange["lighthouse"], of_exchange["dense"]
        assert list(sparse["compute_ms"]["forward"]) == ["0", "1", "2", "3"]
        assert list(dense["compute_ms"]["forward"]) == ["0", "3"]
        for times, attention in ((sparse, resolved), (dense, None)):
            sent = layer_bytes(exchange, attention, 4, 2, 512, of)
            assert times["bytes"] == {"forward": sent.forward, "backward": sent.backward}
        by_factor = sparse["projected_exposed_ms"]["InfiniBand NDR"]
        assert by_factor["0.5"]["forward_backward"] > by_factor["2.0"]["forward_backward"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--emulate", "1"], "--emulate 1: takes 2 ranks or more"),
        (["--exchanges", "ring,rong"], "--exchanges rong: valid are ring, allgather, ulysses, ring_flash_attn"),
        (
            ["--emulate", "8", "--exchanges", "ulysses"],
            "exchange 'ulysses' shares 4 query and 2 KV heads among 8 ranks",
        ),
    ],
)
def test_a_wrong_flag_is_one_message(
    config: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scaling.main([str(config), "--out", str(tmp_path / "out.json"), *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_transfer_is_exposed_as_far_as_compute_does_not_hide_it() -> None:
    """At 1 GB/s and 1 us, by hand: 10^6 bytes take 1 ms, and one transfer leaves after the other."""
    network = Network(1.0, 1.0, "")
    begin, wait = True, False
    hidden = Pass(3.0, 1.0, ((begin, 0, 0.0), (wait, 0, 2.0)), (10,), (1_000_000,))
    assert exposed_ms(hidden, network) == 0
    half = Pass(3.0, 1.0, ((begin, 0, 0.0), (wait, 0, 0.5)), (10,), (1_000_000,))
    assert exposed_ms(half, network) == pytest.approx(0.501)
    # The second leaves at 1.0, arrives at 2.001; by then 0.501 has been waited, so it is awaited at 1.001.
    marks = ((begin, 0, 0.0), (begin, 1, 0.0), (wait, 0, 0.5), (wait, 1, 0.5))
    queued = Pass(3.0, 1.0, marks, (10, 10), (1_000_000, 1_000_000))
    assert exposed_ms(queued, network) == pytest.approx(0.501 + 1.0)


def test_copies_in_place_of_transfers_are_not_compute() -> None:
    """Moments in seconds: a transfer that begins at 1 ms is copied until 3 ms and awaited at 4 ms of 6."""
    kinds = [("start", -1), ("begin", 0), ("copied", -1), ("wait", 0), ("end", -1)]
    recording = _Recording(False, moments=[0.0, 0.001, 0.003, 0.004, 0.006], kinds=kinds, nbytes=[8], busy=[9])
    done = recording.read(7.0)
    assert done.compute_ms == pytest.approx(4.0)
    assert [(begins, number) for begins, number, _ in done.marks] == [(True, 0), (False, 0)]
    assert [at for _, _, at in done.marks] == pytest.approx([1.0, 2.0])
    assert (done.nbytes, done.busy) == ((8,), (9,))


def test_a_rank_alone_receives_what_it_sends() -> None:
    """Over and over, where more comes than goes; the network is busy with the larger."""
    alone, received = Alone(0, 4, torch.device("cpu")), torch.empty(5)

    def transfer() -> None:
        link = alone.link()
        link.post(Transfer(1, torch.tensor([1.0, 2.0]), received), Transfer(1, torch.ones(1), None))
        link.wait()

    (done,) = alone.passes(transfer, 1)
    assert received.tolist() == [1, 2, 1, 2, 1]
    assert (done.nbytes, done.busy) == ((12,), (20,))


def test_dense_attention_of_one_device_is_extrapolated_by_the_square(
    monkeypatch: pytest.MonkeyPatch, config: Path
) -> None:
    def measure(attention: Any, inputs: list[torch.Tensor], repeats: int) -> dict[str, Any]:
        return {kind: {"p50_ms": float(inputs[0].shape[1])} for kind in ("forward", "forward_backward")}

    monkeypatch.setattr(scaling.layers, "measure", measure)
    resolved = config_file.load(config, ["parallel.cp=4"]).resolve(4)
    layer = scaling.layers.Layer.of(resolved, torch.device("cpu"))
    found = scaling.shares.one_device(resolved, layer, 1, True)
    assert found["lighthouse"]["forward"] == 512
    assert found["dense"]["forward"] == 128 * 16


def test_a_check_that_one_rank_fails_is_failed(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(layer: Any, length: int, attention: Any, cp: ContextParallel, *others: Any) -> dict[str, Any]:
        errors = {"selection": 0.0, "out": float(cp.rank == 1)}
        of = {"length": length, "against": "one process", "attention": attention.model_dump()}
        return of | layer_module._verdict("float32", "norm", errors, {"out": 4e-6})

    monkeypatch.setattr(scaling.layers, "check", check)
    assert scaling.main([str(config), "--emulate", "2", "--out", str(tmp_path / "out.json")]) == 1
    assert "ring out 1 (at most 8e-06); nothing was timed" in capsys.readouterr().err
