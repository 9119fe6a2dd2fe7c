"""Preflight's schedule, judgement and checks, without a network."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

from lhcp.config import ConfigError
from lhcp.distributed.env import ProcessEnv
from lhcp.preflight.__main__ import LARGEST_MATMUL, _arguments, _shown
from lhcp.preflight.judge import PairFigures, RankFigures, SumFigures, judge
from lhcp.preflight.measure import gemm, measure_rank, participants, tournament

VERSIONS = {"torch": "2.13.0", "driver": "580.1", "device": "NVIDIA B200"}
NODES = ("n0", "n1", "n2", "n3")


def figures(**changes: dict[str, Any]) -> list[RankFigures]:
    """Two ranks on each of four nodes; `n2={"gemm_tflops": 5}` changes the second rank of n2."""
    ranks = [RankFigures(rank, f"n{rank // 2}", VERSIONS, 100.0, 50.0, 8.0) for rank in range(8)]
    for node, values in changes.items():
        rank = 2 * NODES.index(node) + 1
        ranks[rank] = replace(ranks[rank], **values)
    return ranks


def pairs(slow: dict[str, float] | None = None, wrong: tuple[tuple[str, str], ...] = ()) -> list[PairFigures]:
    """Every two nodes at the rate of the slower."""
    rates = dict.fromkeys(NODES, 40.0) | (slow or {})
    return [PairFigures((a, b), min(rates[a], rates[b]), (a, b) not in wrong) for a, b in combinations(NODES, 2)]


def bad(*arguments: Any, slow: float = 0.8) -> dict[str, list[str]]:
    return {node: found.reasons for node, found in judge(*arguments, slow).items() if found.reasons}


@pytest.mark.parametrize("players", range(10))
def test_every_two_meet_once_and_nobody_twice_in_a_round(players: int) -> None:
    rounds = tournament(players)
    assert sorted(pair for meetings in rounds for pair in meetings) == list(combinations(range(players), 2))
    for meetings in rounds:
        busy = [player for pair in meetings for player in pair]
        assert len(busy) == len(set(busy))
    if players:  # no round is wasted
        assert len(rounds) == (players - 1 if players % 2 == 0 else players if players > 1 else 1)


def test_equal_nodes_are_well() -> None:
    nodes = judge(figures(), pairs(), SumFigures(8, 300.0), 0.8)
    assert list(nodes) == list(NODES)
    assert (nodes["n1"].ranks, nodes["n1"].gemm_tflops, nodes["n1"].pair_gb_s) == (2, 100.0, 40.0)
    assert not any(node.reasons for node in nodes.values())
    assert bad(figures(n2={"gemm_tflops": 80.1}), pairs({"n1": 32.1}), None) == {}


def test_one_slow_gpu_makes_a_slow_node() -> None:
    assert bad(figures(n2={"gemm_tflops": 79.0}), pairs(), None) == {
        "n2": ["matrix products at 79 TFLOP/s: 79% of the median over nodes, 100"]
    }
    assert bad(figures(n2={"gemm_tflops": 79.0}), pairs(), None, slow=0.7) == {}


def test_a_slow_link_is_not_blamed_on_its_partners() -> None:
    assert bad(figures(), pairs({"n3": 20.0}), None) == {
        "n3": ["20 GB/s to other nodes: 50% of the median over nodes, 40"]
    }


def test_what_differs_from_most_is_named() -> None:
    other = {"n1": {"versions": VERSIONS | {"driver": "570.9"}}, "n3": {"versions": VERSIONS | {"device": "x86_64"}}}
    assert bad(figures(**other), pairs(), None) == {
        "n1": ["driver is 570.9, and 580.1 elsewhere"],
        "n3": ["device is x86_64, and NVIDIA B200 elsewhere"],
    }
    without = {name: value for name, value in VERSIONS.items() if name != "driver"}
    assert bad(figures(n0={"versions": without}), [], None) == {"n0": ["driver is none, and 580.1 elsewhere"]}


def test_a_failed_rank_makes_its_node_bad_and_keeps_it_out_of_the_network() -> None:
    failed = {"gemm_tflops": None, "versions": {"torch": "2.13.0"}, "failures": ["CUDA error"]}
    ranks = figures(n1=failed)
    assert bad(ranks, [], None) == {"n1": ["rank 3: CUDA error"]}
    assert participants(ranks) == [0, 1, 4, 5, 6, 7]
    assert participants(figures(n0={"versions": VERSIONS | {"device": "x86_64"}})) == [2, 3, 4, 5, 6, 7]
    assert participants([replace(rank, failures=["no"]) for rank in figures()]) == []


def test_wrong_data_are_blamed_on_the_node_that_has_most_of_them() -> None:
    wrong = "data that it exchanged with other nodes was wrong"
    assert bad(figures(), pairs(wrong=(("n0", "n2"), ("n1", "n2"))), None) == {"n2": [wrong]}
    assert bad(figures(), pairs(wrong=(("n0", "n2"),)), None) == {"n0": [wrong], "n2": [wrong]}
    assert bad(figures(), pairs(), SumFigures(8, 300.0, ["n3"])) == {"n3": ["the sum over all ranks was wrong"]}


def test_the_table_ends_with_the_option() -> None:
    total = SumFigures(8, 312.4)
    nodes = judge(figures(n1={"gemm_tflops": 50.0}, n3={"failures": ["CUDA error"]}), pairs(), total, 0.8)
    lines = _shown(nodes, total, True).splitlines()
    assert lines[0].split() == ["node", "ranks", "device", "TFLOP/s", "copy", "GB/s", "free", "GiB", "pairs", "GB/s"]
    assert [line.split() for line in lines[1:3]] == [
        ["n0", "2", "NVIDIA", "B200", "100", "50", "8", "40", "ok"],
        ["n1", "2", "NVIDIA", "B200", "50", "50", "8", "40", "bad"],
    ]
    assert lines[5:] == [
        "all-reduce over 8 ranks: 312 GB/s bus bandwidth",
        "n1: matrix products at 50 TFLOP/s: 50% of the median over nodes, 100",
        "n3: rank 7: CUDA error",
        "--exclude=n1,n3",
    ]
    assert _shown(judge(figures(), [], None, 0.8), None, True).splitlines()[-1] == "no bad node among 4"
    assert _shown(judge(figures(), [], None, 0.8), None, False).splitlines()[-2:] == [
        "note: these are CPUs: PyTorch sees no GPU on any node",
        "no bad node among 4",
    ]


@pytest.mark.parametrize("size", [1, 37, 300])
def test_a_wrong_product_is_seen(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    rate, right = gemm(size, cpu)
    assert right
    assert rate > 0

    multiply = torch.mm

    def faulty(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        multiply(a, b, out=out)
        out[size // 2, size // 3] += 1

    monkeypatch.setattr(torch, "mm", faulty)
    assert not gemm(size, cpu)[1]


def test_what_goes_wrong_on_a_rank_is_part_of_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    missing = measure_rank(ProcessEnv(3, 99, 4), "cuda", 8, 1)
    assert (missing.rank, missing.node, missing.gemm_tflops) == (3, "n7", None)
    assert missing.failures[0].startswith("device cuda: local rank 99 has no GPU")

    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("uncorrectable ECC error\nmore")

    monkeypatch.setattr(torch, "mm", broken)
    assert measure_rank(ProcessEnv(0, 0, 1), "cpu", 8, 1).failures == ["uncorrectable ECC error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size-mb", "0"], "--size-mb 0: must be from 1 to"),
        (["--matmul", "20000"], f"--matmul 20000: must be from 1 to {LARGEST_MATMUL}"),
        (["--slow", "1.5"], "--slow 1.5: must be above 0 and at most 1"),
    ],
)
def test_numbers_out_of_range(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _arguments(["--out", "x", *words])


def test_the_judgement_needs_no_torch() -> None:
    code = "import sys, lhcp.preflight.judge; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
