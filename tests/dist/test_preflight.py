"""Preflight as it is started, over gloo: processes that name themselves as other nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lhcp.launch.snapshot import copy_code
from lhcp.preflight.measure import _exchanged, _summed
from ranks import run_ranks

SMALL = ["--device", "cpu", "--size-mb", "1", "--matmul", "64"]
# Processes share the cores with other tests: no rate is judged.
ANY_SPEED = ["--slow", "1e-6"]


def preflight(nproc: int, node: str, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Start it under the agent; `node` is what a process of $RANK does to its environment."""
    words = " ".join([*SMALL, *ANY_SPEED, *more])
    script = f"{node}; exec {sys.executable} -m lhcp.preflight --out {out} {words}"
    command = [sys.executable, "-m", "lhcp.agent", "--standalone", f"--nproc-per-node={nproc}", "--no-python"]
    return subprocess.run(
        [*command, "bash", "-c", script],
        capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=out.parent,
    )  # fmt: skip


def test_two_nodes_of_one_rank(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "exclude.txt").write_text("--exclude=earlier\n")
    done = preflight(2, "export SLURMD_NODENAME=n$RANK", out)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["node", "n0", "n1"]
    assert lines[-1] == "no bad node among 2"
    assert "preflight: pairs n0-n1" in done.stderr
    assert (out / "exclude.txt").read_text() == ""
    result = json.loads((out / "preflight.json").read_text())
    assert result["exclude"] == []
    assert [(pair["nodes"], pair["right"]) for pair in result["pairs"]] == [(["n0", "n1"], True)]
    assert (result["sum"]["ranks"], result["sum"]["wrong"]) == (2, [])
    assert all(value > 0 for rank in result["ranks"] for value in (rank["gemm_tflops"], rank["copy_gb_s"]))
    assert result["ranks"][0]["versions"]["torch"] == torch.__version__


def test_a_node_with_other_code_is_named(tmp_path: Path) -> None:
    """Four ranks on three nodes; one node runs a copy of the package that somebody changed."""
    copy_code(tmp_path / "copy")
    with (tmp_path / "copy" / "lhcp" / "loss.py").open("a") as file:
        file.write("# changed\n")
    node = f"export SLURMD_NODENAME=n$((RANK / 2 + RANK / 3)); [ $RANK = 2 ] && export PYTHONPATH={tmp_path}/copy"
    done = preflight(4, node, tmp_path / "out")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    *_, reason, option = done.stdout.splitlines()
    assert reason.startswith("n1: code is ")
    assert option == "--exclude=n1"
    assert (tmp_path / "out" / "exclude.txt").read_text() == "--exclude=n1\n"
    result = json.loads((tmp_path / "out" / "preflight.json").read_text())
    assert {tuple(pair["nodes"]) for pair in result["pairs"]} == {("n0", "n1"), ("n0", "n2"), ("n1", "n2")}
    assert {node: values["ranks"] for node, values in result["nodes"].items()} == {"n0": 2, "n1": 1, "n2": 1}


def test_an_output_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = preflight(2, ":", tmp_path / "file")
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("faulty", [None, 1])
def test_wrong_data_are_seen_where_they_arrive(faulty: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange, reduce = dist.batch_isend_irecv, dist.all_reduce

    def rank_main(rank: int) -> tuple[bool, bool]:
        group, cpu = dist.group.WORLD, torch.device("cpu")

        def faulty_exchange(transfers: list[Any]) -> list[Any]:
            for work in exchange(transfers):
                work.wait()
            transfers[0].tensor[-1] += 1
            return []

        def faulty_sum(values: Tensor, group: Any) -> None:
            reduce(values, group=group)
            values[0] += 1

        if rank == faulty:
            monkeypatch.setattr(dist, "batch_isend_irecv", faulty_exchange)
            monkeypatch.setattr(dist, "all_reduce", faulty_sum)
        return _exchanged(group, 1 - rank, 1000, cpu)[1], _summed(group, 1000, cpu)[1]

    assert run_ranks(2, rank_main) == [(True, True), (faulty is None, faulty is None)]
