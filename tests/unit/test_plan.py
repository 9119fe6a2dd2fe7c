"""What `lhcp plan` predicts: every configuration, closed forms by hand, and refusals."""

from __future__ import annotations

import json
import statistics
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lhcp import cli, config_file
from lhcp.config import ConfigError, MemoryConfig, ModelConfig, RunConfig, StageMode
from lhcp.distributed.exchange.merge import AT_ONCE
from lhcp.launch import grid
from lhcp.model.llama import Llama
from lhcp.plan import GPUS, Gpu, Plan, as_json, plan_run, show
from lhcp.plan.gpus import GIB
from lhcp.plan.memory import RING_PARTS, Memory, exchange_buffers, memory_of
from lhcp.plan.report import PARTS
from lhcp.plan.share import Share, layers_of, share_of
from lhcp.plan.time import Seconds, step_time

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "launch" / "configs"
FILES = sorted(set(CONFIGS.rglob("*.yaml")) - {CONFIGS / "paper-rows.yaml"})  # which are those in paper/
ON_GPUS = ("device=cuda", "compute_dtype=bfloat16")
H100, B200 = GPUS["h100"], GPUS["b200"]
GPUS_OF = {"1m.yaml": 32, "demo.yaml": 2} | {f"one-gpu/{name}.yaml": 1 for name in ("98k", "1m", "2m")}
GPUS_OF |= {f"small/{name}.yaml": 1 for name in ("base", "recoverability", "ablations", "passkey", "passkey-base")}
"""GPUs of configurations that are not for 8."""


def load(name: str, *overrides: str) -> RunConfig:
    return config_file.load(CONFIGS / name, (*ON_GPUS, *overrides))


def planned(name: str, *overrides: str, gpus: int = 8, gpu: Gpu = B200, gpus_per_node: int = 8) -> Plan:
    return plan_run(load(name, *overrides), gpus, gpu, gpus_per_node)


def share(name: str, *overrides: str, gpus: int = 8) -> Share:
    return share_of(load(name, *overrides).resolve(gpus), gpus, 8)


def expanded(path: Path) -> list[tuple[Path, tuple[str, ...]]]:
    """The runs of a file: itself, or each element of a grid."""
    if not grid.is_grid(path):
        return [(path, ())]
    config, elements = grid.load(path)
    return [(REPOSITORY / config, element.overrides) for element in elements]


@pytest.mark.parametrize("path", FILES, ids=[str(file.relative_to(CONFIGS)) for file in FILES])
def test_every_configuration_fits_what_it_is_for(path: Path) -> None:
    gpus = GPUS_OF.get(str(path.relative_to(CONFIGS)), 8)
    for config, overrides in expanded(path):
        found = plan_run(config_file.load(config, (*ON_GPUS, *overrides, "parallel.dp=null")), gpus, B200)
        assert found.fits or path.name == "sweep.yaml", overrides  # the sweep runs one layer's attention
        assert found.suggestion is not None
        assert found.suggestion.hours <= found.hours * (1 + 1e-9) or not found.fits
        assert found.cp in found.constraints.valid_cp
        assert show(found)


@pytest.mark.parametrize("path", [CONFIGS / "1m.yaml", CONFIGS / "98k.yaml", *sorted((CONFIGS / "paper").glob("*"))])
def test_memory_settings_of_files_are_those_suggested(path: Path) -> None:
    found = plan_run(config_file.load(path), GPUS_OF.get(path.name, 8), B200)
    assert found.suggestion is not None
    assert found.settings == found.suggestion.settings


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"tie_embeddings": True},
        {"num_kv_heads": 2, "num_heads": 8, "head_dim": 48},
    ],
)
def test_parameters_are_those_of_the_model(model: dict[str, Any]) -> None:
    overrides = [f"model.{key}={str(value).lower()}" for key, value in model.items()]
    of = share("demo.yaml", *overrides, gpus=2)
    config: ModelConfig = load("demo.yaml", *overrides).model
    with torch.device("meta"):
        built = Llama(config)
    assert of.parameters == sum(parameter.numel() for parameter in built.parameters())
    assert of.block_parameters == sum(parameter.numel() for parameter in built.blocks[0].parameters())


def test_memory_that_is_always_there_by_hand() -> None:
    """98k.yaml on 8 GPUs: 530,117,632 parameters, of which 262,669,312 are of the root and 8,914,944 of a layer."""
    found = planned("98k.yaml").stages[0].memory.always
    assert found["parameters, float32"] == 4 * 530_117_632 // 8
    assert found["gradients, float32"] == 4 * 530_117_632 // 8
    assert found["AdamW moments"] == 8 * 530_117_632 // 8
    assert found["gathered parameters"] == found["their gradients"] == 2 * (262_669_312 + 2 * 8_914_944)
    assert found["RoPE tables"] == 2 * 98_304 * 64 * 4
    alone = planned("98k.yaml", gpus=1).stages[0].memory.always
    assert alone["AdamW moments"] == 8 * 530_117_632
    assert alone["gathered parameters"] == found["gathered parameters"]


def test_kept_memory_by_hand() -> None:
    """n = 98,304, E = HD = 1,024, 8 heads, S = 18,432, bfloat16; the loss comes after all layers."""
    row, lse = 98_304 * 1024 * 2, 4 * 98_304 * 8
    sub = 18_432 * 1024 * 2 + 4 * 18_432 * 8 + 4 * 18_432 * 8
    sparse, dense = (stage.memory for stage in planned("98k.yaml", "memory.recompute=selective").stages)
    assert sparse.moment == dense.moment == "the loss"
    assert sparse.kept == {
        "inputs of recomputed layers": 30 * row,
        "attention output, log-sum-exp, selected rows": 26 * sub + 4 * (row + lse),
    }
    assert sum(dense.kept.values()) == 30 * (2 * row + lse)
    full = planned("98k.yaml", "memory.recompute=full", "memory.offload_layers=10").stages[0].memory
    assert full.kept == {
        "inputs of recomputed layers": 20 * row,
        "attention output, log-sum-exp, selected rows": 26 * 4 * 18_432 * 8,
    }
    assert full.host == 10 * row
    logits, head = 8192 * 128_256 * 2, 4 * 128_256 * 1024
    assert sum(full.working.values()) == 3 * row + 2 * logits + head


def test_memory_of_a_layer_that_keeps_all_by_hand() -> None:
    """In units of E = HD = GD: x, two norms, residual, attention output, 3 of q, k, v; 4.5 of F.

    In a dense layer v holds the product of all three from before RoPE: 2 more.
    """
    unit = 98_304 * 1024 * 2
    ffn = 3 * 98_304 * 1536 * 2
    pyramid = 98_304 + 98_304 // 4 + 98_304 // 16
    small = 18_432 * 1024 * 2
    found = planned("98k.yaml", "memory.recompute=selective", "memory.recompute_layers=29").stages
    name = "activations of layers that are not recomputed"
    assert found[1].memory.kept[name] == 10 * unit + ffn + 4 * 98_304 * 8  # layer 29 is dense
    all_sparse = planned("98k.yaml", "dense_layers=[]", "memory.recompute=selective", "memory.recompute_layers=29")
    expected = 5 * unit + ffn + 4 * small + 4 * 18_432 * 8 + 4 * 18_432 * 8 + 4 * 8 * pyramid
    assert all_sparse.stages[0].memory.kept[name] == expected


def test_a_moment_in_a_layer_by_hand() -> None:
    """1M on one GPU: the last layer's feed-forward backward, of 5 rows of E and 5 of F; as measured, 38.2 GiB."""
    found = planned("one-gpu/1m.yaml", gpus=1, gpu=H100).stages[0].memory
    n = 1_048_576
    row, ffn = n * 1024 * 2, n * 1536 * 2
    attended = 65_536 * 1024 * 2 + 2 * 4 * 65_536 * 8
    assert found.moment == "feed-forward backward of layer 29"
    assert sum(found.working.values()) == 5 * row + 5 * ffn + attended
    assert sum(found.kept.values()) == 29 * attended + row  # layer 28's input stays, too
    assert found.always["gradients, float32"] == 0  # of one micro-batch, not there yet
    assert found.peak / GIB == pytest.approx(38.2, rel=0.01)
    returning = planned("one-gpu/1m.yaml", "memory.offload_layers=30", gpus=1, gpu=H100).stages[0].memory
    assert returning.working["an input on its way from the host"] == row
    assert returning.host == 30 * row


def test_buffers_of_exchanges_by_hand() -> None:
    """1M over 8 ranks, r = 8,192 rows of S on each, K and V of 8 heads of 128: kv = 2,048 elements a row."""
    ours, kv = 65_536 // 8, 2 * 1024
    expected = {
        # Of K, V and their gradients at most W + 3 parts. Of dQ five that wait, and a sum in float32.
        "ring": ours * kv * 2 * (8 + 3) + ours * 1024 * (5 * 2 + 4),
        "allgather": 8 * ours * kv * (2 + 3 * 4),
        "ulysses": ours * (2 * 1024 + kv) * 2,
    }
    for exchange, size in expected.items():
        assert exchange_buffers(share("1m.yaml", f"parallel.exchange={exchange}", gpus=32), "lighthouse") == size
    # Over two ranks nothing waits for a sum: one block of K and V, 3.5 of gradients, and two of dQ.
    two = share("1m.yaml", "parallel.cp=2", gpus=8)
    assert exchange_buffers(two, "lighthouse") == 4 * ours * (kv * 9 + 1024 * 2 * 2)
    both = share("1m.yaml", "parallel.cp=4", "micro_batch_size=2", "global_batch_size=16", gpus=8)
    assert exchange_buffers(both, "lighthouse") == 2 * 2 * ours * (kv * 2 * (4 + 3 + 2) + 1024 * 2 * 4)
    assert RING_PARTS == AT_ONCE


def test_a_micro_batch_of_two_sequences() -> None:
    """Twice the tokens at once: what layers keep doubles, the time of a step stays."""
    both = ("global_batch_size=32", "memory.recompute=selective")
    one = planned("98k.yaml", *both, gpus=1).stages
    two = planned("98k.yaml", *both, "micro_batch_size=2", gpus=1).stages
    for a, b in zip(one, two, strict=True):
        assert sum(b.memory.kept.values()) == 2 * sum(a.memory.kept.values())
        assert b.step.total == pytest.approx(a.step.total, rel=1e-9)


def test_parameters_between_nodes_by_hand() -> None:
    """Of 8 nodes of 8, seven eighths come over the network, which all GPUs of a node share; within one, over NVLink."""
    slow = replace(B200, network=1e9, nvlink=1e15)
    root, batch = 262_669_312, ("global_batch_size=64", "eval.sequences=0")
    step = planned("98k.yaml", *batch, gpus=64, gpu=slow).stages[0].step
    per_parameter = (2 + 4) * 7 / 8 / (1e9 * 8)
    assert step.fsdp >= root * per_parameter  # once a micro-batch, besides what layers do not hide
    alone = planned("98k.yaml", *batch, gpus=8, gpu=slow).stages[0].step
    assert alone.fsdp < 1e-3


def needs(mode: StageMode, **memory: Any) -> tuple[Memory, float]:
    """Memory, and seconds of a step, of a stage of 98k.yaml."""
    run = load("98k.yaml").resolve(8)
    of, layers = share_of(run, 8, 8), layers_of(run, MemoryConfig(**memory), mode)
    return memory_of(of, layers), step_time(of, B200, layers).total


@pytest.mark.parametrize("stage", ["lighthouse", "dense"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_each_layer_recomputed_takes_less_memory_and_more_time(stage: StageMode, recompute: str) -> None:
    found = [needs(stage, recompute=recompute, recompute_layers=count) for count in range(31)]
    peaks, times = [memory.peak for memory, _ in found], [seconds for _, seconds in found]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > 2 * peaks[-1]
    assert times == sorted(set(times))
    assert needs(stage, recompute="none") == found[0]
    assert needs(stage, recompute=recompute) == found[-1]


@pytest.mark.parametrize("stage", ["lighthouse", "dense"])
def test_each_input_offloaded_moves_to_the_host(stage: StageMode) -> None:
    row = 98_304 * 1024 * 2
    found = [needs(stage, recompute="full", offload_layers=count) for count in range(31)]
    assert [memory.host for memory, _ in found] == [count * row for count in range(31)]
    peaks = [memory.peak for memory, _ in found]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[10] - peaks[20] == 10 * row
    assert all(seconds >= found[0][1] * (1 - 1e-9) for _, seconds in found)


def test_the_peak_is_that_of_the_worst_moment() -> None:
    """In the last layers, which keep all, a backward needs more than the loss; then the loss of a large vocabulary."""
    run = load("98k.yaml", "model.vocab_size=512").resolve(8)
    of = share_of(run, 8, 8)
    found = memory_of(of, layers_of(run, run.memory, "dense"))
    assert found.moment == "feed-forward backward of layer 29"
    assert found.peak == sum(map(sum, (found.always.values(), found.kept.values(), found.working.values())))
    assert planned("98k.yaml", "memory.recompute=full").stages[0].memory.moment == "the loss"


def test_time_by_hand() -> None:
    """98k.yaml on one GPU of round rates, 32 micro-batches of one sequence."""
    gpu = replace(
        H100, peak_flops=1e15, gemm=0.5, attention_forward=0.5, attention_backward=0.5,
        memory_bandwidth=1e12, elementwise=1.0, copy=1.0, lighthouse_over_floor=1.0,
    )  # fmt: skip
    dense = planned("98k.yaml", "memory.recompute=none", gpus=1, gpu=gpu).stages[1].step
    sparse = planned("98k.yaml", "memory.recompute=none", gpus=1, gpu=gpu).stages[0].step
    n, layer = 98_304, 4 * 1024**2 + 3 * 1024 * 1536
    assert dense.gemm == pytest.approx(32 * 30 * 6 * n * layer / 5e14, rel=1e-3)  # norms are counted with products
    per_layer = 3.5 * 4 * 1024 / 2 / 5e14
    assert dense.attention == pytest.approx(32 * 30 * per_layer * n**2)
    assert sparse.attention == pytest.approx(32 * per_layer * (4 * n**2 + 26 * 18_432**2))
    assert dense.lighthouse == 0
    assert sparse.lighthouse == pytest.approx(32 * 26 * 2 * (n + 18_432) * 4 * 1024 * 2 / 1e12)
    assert dense.loss == pytest.approx(32 * n * 128_256 * (6 * 1024 / 5e14 + 8 / 1e12))
    assert dense.optimizer == pytest.approx(28 * 530_117_632 / 1e12)
    assert dense.exchange == dense.fsdp == dense.offload == dense.scorer == 0
    again = planned("98k.yaml", "memory.recompute=full", gpus=1, gpu=gpu).stages[1].step
    assert again.attention == pytest.approx(dense.attention * 4.5 / 3.5)
    assert again.gemm - dense.gemm == pytest.approx(32 * 30 * 2 * n * (layer - 1024 * 1536) / 5e14, rel=1e-3)
    kept = planned("98k.yaml", "memory.recompute=selective", gpus=1, gpu=gpu).stages[1].step
    assert kept.attention == dense.attention
    assert kept.gemm == again.gemm
    dilated = planned("98k.yaml", "attention.scorer=dilated", "memory.recompute=full", gpus=1, gpu=gpu).stages[0].step
    pairs = 2 * (n // 4) ** 2 / 2 * 4  # two attentions, four groups, each of all heads; never again
    assert dilated.scorer == pytest.approx(32 * 26 * (4 * pairs * 1024 / 5e14 + 2 * n * 1024 * 2 / 1e12))


def test_units() -> None:
    found = planned("98k.yaml")
    for stage in found.stages:
        assert stage.hours == pytest.approx(stage.steps * stage.step.total / 3600)
        assert stage.gpu_hours == pytest.approx(8 * stage.hours)
        assert stage.tokens_per_s_per_gpu == pytest.approx(32 * 98_304 / stage.step.total / 8)
        assert 0.2 < stage.mfu < 0.65
    assert found.gpu_hours == pytest.approx(sum(stage.gpu_hours for stage in found.stages))
    assert found.usable_bytes == pytest.approx((179.1 - 11) * GIB)
    bytes_of = planned("1m.yaml", gpus=32).sent["lighthouse"]["ring"]
    assert bytes_of is not None
    assert round(bytes_of.forward / 1e6, 1) == 235.1  # docs/context-parallel.md
    assert round(bytes_of.backward / 1e6, 1) == 352.5


def test_a_slow_link_is_exposed_and_a_fast_one_is_not() -> None:
    quick, slow = (replace(B200, nvlink=nvlink, nvlink_latency=0.0) for nvlink in (1e15, 1e9))
    for exchange in ("ring", "allgather", "ulysses"):
        override = f"parallel.exchange={exchange}"
        fast = planned("1m.yaml", override, gpus=32, gpu=quick).stages[0].step
        late = planned("1m.yaml", override, gpus=32, gpu=slow).stages[0].step
        assert fast.exchange < 1e-3 < 0.1 < late.exchange
        assert late.fsdp > 0.1
    inside = planned("1m.yaml", gpus=32).stages[0].step.exchange
    across = planned("1m.yaml", gpus=32, gpus_per_node=4).stages[0].step.exchange
    assert across > 5 * inside
    host = replace(B200, pcie=1e9)
    overrides = ("memory.recompute=full", "memory.offload_layers=30")
    assert planned("98k.yaml", *overrides, gpu=host).stages[0].step.offload > 1
    assert planned("98k.yaml", *overrides).stages[1].step.offload == 0


def test_degrees_that_are_valid() -> None:
    """16 strata: 2 cp divides them; the batch of 32 is no multiple of dp = 64."""
    assert planned("98k.yaml").constraints.valid_cp == (1, 2, 4, 8)
    assert planned("98k.yaml", "parallel.cp=2", "eval.sequences=0", gpus=64).constraints.valid_cp == (2, 4, 8)
    found = planned("98k.yaml", "seq_len=98000").constraints
    assert (found.seq_len, found.padded_len, found.subsequence) == (98_000, 98_048, 6_128 + 12_288)
    assert (found.strata, found.budget) == (16, 96)
    assert planned("paper/dense.yaml").constraints.strata is None


def test_rates_are_those_measured() -> None:
    forward, backward, around = [], [], []
    for name in ("latency-98k.json", "latency-1m.json"):
        for at in json.loads((REPOSITORY / "benchmarks" / "results" / name).read_text())["lengths"]:
            if at["seq_len"] < 65_536:
                continue
            around.append(at["around"]["forward_backward"]["p50_ms"] / at["floor_ms"]["forward_backward"])
            for key, rows in (("dense", "seq_len"), ("dense_on_subsequence", "subsequence_length")):
                flops = 4 * at[rows] ** 2 / 2 * 1024
                first = at[key]["forward"]["p50_ms"] / 1e3
                forward.append(flops / first)
                backward.append(2.5 * flops / (at[key]["forward_backward"]["p50_ms"] / 1e3 - first))
    assert H100.attention_forward_flops == pytest.approx(statistics.median(forward), rel=1e-3)
    assert H100.attention_backward_flops == pytest.approx(statistics.median(backward), rel=1e-3)
    assert H100.lighthouse_over_floor == pytest.approx(statistics.median(around), rel=1e-2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["device=cpu"], "but device is cpu; --set device=cuda"),
        (["compute_dtype=float32"], "but compute_dtype is float32; --set compute_dtype=bfloat16"),
        (["compute_dtype=null"], "but compute_dtype is float32; --set compute_dtype=bfloat16"),
        (["dtype=float64", "compile=false"], "dtype is float64, compile is false; --set dtype=float32 --set compile="),
        (["parallel.cp=3"], "set parallel.cp to a divisor of 8"),
        (["attention.num_strata=7"], "num_strata 7 is not legal"),
        (
            ["memory.offload_layers=31", "memory.recompute=full"],
            "only layers that are recomputed can be offloaded, here 30",
        ),
    ],
)
def test_refusals(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        planned("98k.yaml", *overrides)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_gpus_fill_nodes() -> None:
    with pytest.raises(ConfigError, match="--gpus 12 is not a multiple of --gpus-per-node 8"):
        planned("98k.yaml", "global_batch_size=12", "eval.sequences=0", gpus=12)
    assert planned("98k.yaml", gpus=2).gpus_per_node == 2


def test_the_command() -> None:
    arguments = ["plan", str(CONFIGS / "1m.yaml"), "--gpus", "32", "--gpu", "B200"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    found = planned("1m.yaml", gpus=32)
    assert done.stdout == show(found)
    for said in (
        "S = 65,536",
        "32, of m = 128",
        "cp can be",
        "Pinned host memory",
        "ring (used)",
        "lighthouse_over_floor",
    ):
        assert said in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    as_data = CliRunner().invoke(cli.app, [*arguments, "--json", "--set", "memory.recompute=full"])
    data = json.loads(as_data.stdout)
    assert data == json.loads(json.dumps(as_json(planned("1m.yaml", "memory.recompute=full", gpus=32))))
    assert data["stages"][1]["step"]["total"] == pytest.approx(data["stages"][1]["hours"] * 3600 / 1000)
    assert data["suggestion"]["arguments"].startswith("--set memory.recompute=")
    wrong = CliRunner().invoke(cli.app, [*arguments[:-1], "a100"])
    assert wrong.exit_code == 2


def test_every_part_of_a_step_has_a_name() -> None:
    assert list(PARTS) == [field.name for field in fields(Seconds)]
