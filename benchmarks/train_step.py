"""Whole training steps on real text: tokens/s, MFU, memory, and where the time goes; Lighthouse and dense in one run.

    python -m benchmarks.train_step CONFIG [--set KEY=VALUE ...] --out FILE.json [--modes lighthouse,dense] [--steps 12]
        [--memory RECOMPUTE[:RECOMPUTE_LAYERS[:OFFLOAD_LAYERS]] ...] [--dense-layer]

Each mode is measured at every `--memory` setting, which replaces the configuration's, and reported at the fastest that
fits. Nothing is timed unless, at a short length, the trainer's gradients are those of plain layers without compilation,
recomputation or offload. `--dense-layer` measures dense attention on one layer alone, and extrapolates. Exit codes: 0
done, 1 a check failed, 2 something that the user can correct.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import layer as layers
from benchmarks.common import Record, environment, make_way, percentiles, reset_peak_memory, table, write_json
from benchmarks.step_parts import AROUND, ATTENTION, PARTS, step_parts
from lhcp import config_file
from lhcp.checks import check_data, check_host_memory
from lhcp.config import ConfigError, MemoryConfig, RunConfig, StageConfig, StageMode
from lhcp.config.validation import validate
from lhcp.distributed import ContextParallel
from lhcp.distributed.env import ProcessEnv, process_group
from lhcp.flops import peak_flops, step_flops
from lhcp.metrics import tell
from lhcp.parallelize import Mesh, full
from lhcp.trainer import Trainer
from lhcp.watchdog import collective_timeout

NAME = "train_step"
WARM_UP = 2
"""Steps that are not timed: compilation, host memory, clocks."""
GRADIENT_TOLERANCE = 1e-3
"""Largest relative norm of a difference of gradients in float32, where a near-tie of selection may flip."""
HEADER = ["mode", "recompute", "offload", "step s", "tokens/s/GPU", "MFU", "GPU GiB", "host GiB", *PARTS]


def main(argv: Sequence[str] | None = None) -> int:
    """Check and measure; the exit code."""
    try:
        return _main(_arguments(argv))
    except (ConfigError, FloatingPointError) as error:
        tell(error)
        return 2


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """`config`, `overrides`, `out`, `modes`, `steps`, `memory`, `dense_layer`."""
    parser = argparse.ArgumentParser(prog="benchmarks.train_step", description="Time whole training steps.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--modes", default="lighthouse,dense", help="of lighthouse and dense; by default both")
    parser.add_argument("--steps", type=int, default=12, help=f"steps, of which the first {WARM_UP} are not timed")
    parser.add_argument("--memory", action="append", metavar="RECOMPUTE[:LAYERS[:OFFLOAD]]", help="a setting to try")
    parser.add_argument("--dense-layer", action="store_true", help="dense attention on one layer, extrapolated")
    return parser.parse_args(argv)


def _main(args: argparse.Namespace) -> int:
    modes = args.modes.split(",")
    if not set(modes) <= {"lighthouse", "dense"}:
        raise ConfigError(f"--modes {args.modes}: must be of lighthouse and dense, separated by commas")
    if args.dense_layer and "lighthouse" not in modes:
        raise ConfigError("--dense-layer takes all but attention from Lighthouse steps; measure those, too: --modes")
    if args.steps <= WARM_UP:
        raise ConfigError(f"--steps {args.steps}: must be at least {WARM_UP + 1}, the first {WARM_UP} are not timed")
    env = ProcessEnv.read()
    config = config_file.load(args.config, args.overrides)
    settings = [setting(text) for text in args.memory or []] or [config.memory]
    tried = {
        mode: [in_mode(config, mode, args.steps, memory).resolve(env.world_size) for memory in settings]
        for mode in modes
    }
    device = env.device(config.device)
    if args.dense_layer and device.type == "cpu":
        raise ConfigError("--dense-layer takes the time of parts from a GPU's profile; leave it out on a CPU")
    for one in tried[modes[0]]:
        check_data(one)
        check_host_memory(one, env.local_world_size)
    make_way(args.out)
    with process_group(env, device, collective_timeout(config.hang_timeout_s)):
        result: Record = {
            "benchmark": NAME,
            "config": tried[modes[0]][0].model_dump(mode="json"),
            "environment": environment(device, config.activation_dtype),
            "check": check(tried[modes[0]], device),
        }
        if result["check"]["passed"]:
            result["modes"] = {mode: fastest([measure(one, device) for one in tried[mode]]) for mode in modes}
            if args.dense_layer:
                result["dense_extrapolated"] = extrapolated(tried[modes[0]][0], result["modes"]["lighthouse"], device)
    if env.rank == 0:
        write_json(args.out, result)
        if not result["check"]["passed"]:
            tell(f"gradients or losses differ: {result['check']}; nothing was timed")
        else:
            print(table(HEADER, [row(mode, found) for mode, found in result["modes"].items()]))
    return 0 if result["check"]["passed"] else 1


def setting(text: str) -> MemoryConfig:
    """`RECOMPUTE[:RECOMPUTE_LAYERS[:OFFLOAD_LAYERS]]`.

    Raises:
        ConfigError: something else.
    """
    match = re.fullmatch(r"(none|selective|full)(?::(\d*)(?::(\d*))?)?", text)
    if match is None:
        raise ConfigError(f"--memory {text}: RECOMPUTE[:RECOMPUTE_LAYERS[:OFFLOAD_LAYERS]], such as selective:12:4")
    recompute, layers_, offload = match.groups()
    return validate(
        MemoryConfig,
        {
            "recompute": recompute,
            "recompute_layers": int(layers_) if layers_ else None,
            "offload_layers": int(offload or 0),
        },
    )


def in_mode(config: RunConfig, mode: StageMode, steps: int, memory: MemoryConfig) -> RunConfig:
    """The run in one mode, and as many steps as are measured and profiled."""
    stages = [StageConfig(mode=mode, steps=steps + 1)]
    return config.model_copy(update={"stages": stages, "memory": memory})


def make_trainer(config: RunConfig, device: torch.device) -> Trainer:
    """A trainer at the beginning of a run."""
    return Trainer(config, Mesh.build(config.parallel, device), device)


def check(tried: Sequence[RunConfig], device: torch.device) -> Record:
    """Loss and gradients of small models at a short length, in float32, against those of plain layers."""
    found: list[Record] = []
    reference = None
    for small in {str(small.memory): small for small in map(shortened, tried)}.values():
        plain = small.model_copy(update={"memory": MemoryConfig(), "compile": False})
        reference = reference or _gradients(plain, device)
        loss, gradients = _gradients(small, device)
        errors = torch.stack([(gradients[n] - x).norm() / x.norm() for n, x in reference[1].items()])
        found.append({
            "memory": small.memory.model_dump(),
            "gradient_error": float(errors.max()),  # not a number where one of them is not
            "loss_error": abs(loss - reference[0]) / abs(reference[0]),
        })  # fmt: skip
    passed = all(x["gradient_error"] <= GRADIENT_TOLERANCE and x["loss_error"] <= GRADIENT_TOLERANCE for x in found)
    return {"passed": passed, "settings": found}


def shortened(config: RunConfig) -> RunConfig:
    """A run of four layers and a short sequence, float32, with as much of the memory setting as four layers show."""
    short, attention = layers.shortened(config.attention, config.padded_len, config.parallel.num_chunks)
    memory, some = config.memory, config.memory.recompute_layers
    if config.memory.recompute != "none":
        every = some is None or some == config.model.num_layers
        memory = memory.model_copy(
            update={
                "recompute_layers": None if every else 3,
                "offload_layers": min(
                    2 if config.memory.offload_layers < config.model.num_layers else 4, memory.offload_layers
                ),
            }
        )
    assert config.parallel.dp is not None
    return config.model_copy(
        update={
            "seq_len": short,
            "attention": attention,
            "memory": memory,
            "model": config.model.model_copy(update={"num_layers": 4}),
            "dense_layers": [0],
            "compute_dtype": "float32",
            "global_batch_size": config.parallel.dp,
            "micro_batch_size": 1,
            "parallel": config.parallel.model_copy(update={"block_backend": "auto"}),
        }
    )


def _gradients(config: RunConfig, device: torch.device) -> tuple[float, dict[str, torch.Tensor]]:
    trainer = make_trainer(config, device)
    loss = float(trainer.gradients(0, trainer.attention(config.stages[0].mode)))
    return loss, {name: full(p.grad) for name, p in trainer.model.named_parameters() if p.grad is not None}


def measure(config: RunConfig, device: torch.device) -> Record:
    """Steps of one mode at one setting; `fits` False, and no more, where memory does not suffice."""
    found: Record = {"memory": config.memory.model_dump()}
    try:
        return found | _measure(config, device)
    except torch.OutOfMemoryError as error:
        if dist.get_world_size() > 1:  # the others would wait for this rank
            raise
        found |= {"fits": False, "error": str(error).partition(". ")[0]}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _measure(config: RunConfig, device: torch.device) -> Record:
    trainer = make_trainer(config, device)
    steps = config.total_steps - 1
    reset_peak_memory(device)
    losses, seconds = [], []
    for _ in range(steps):
        started = time.perf_counter()
        losses.append(trainer.train_step()[0])
        seconds.append(time.perf_counter() - started)
    if not all(map(math.isfinite, losses)):
        raise ConfigError(f"losses are not finite: {losses}; lower optim.lr")
    times = percentiles([1e3 * s for s in seconds[WARM_UP:]])
    step_s = times["p50_ms"] / 1e3
    mode, world = config.stages[0].mode, trainer.mesh.ranks.size()
    on_gpu = device.type == "cuda"
    peak = peak_flops(torch.cuda.get_device_name(device)) if on_gpu else None
    found: Record = {
        "fits": True,
        "losses": losses,
        "first_steps_s": seconds[:WARM_UP],
        "step": times,
        "tokens_per_s_per_gpu": config.global_batch_size * config.seq_len / step_s / world,
        "mfu": step_flops(config, mode) / (step_s * world * peak) if peak else None,
        "gpu_gib": torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None,
        "gpu_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30 if on_gpu else None,
        "process_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "offloaded_gib": offloaded_bytes(config) / 2**30,
    }
    if not on_gpu:
        return found
    mine = step_parts(trainer.train_step)
    by_rank: list[Record] = [{}] * world
    dist.all_gather_object(by_rank, {key: mine[key] for key in ("parts_ms", "transfers_ms")})
    return found | mine | {"by_rank": by_rank}


def offloaded_bytes(config: RunConfig) -> int:
    """Of pinned host memory that a rank uses for layers' inputs."""
    tokens = config.micro_batch_size * config.padded_len // config.parallel.cp
    itemsize = getattr(torch, config.activation_dtype).itemsize
    return int(config.memory.offload_layers * tokens * config.model.dim * itemsize)


def fastest(found: Sequence[Record]) -> Record:
    """The fastest setting that fits, with all that were tried.

    Raises:
        ConfigError: none fits.
    """
    fitting = [one for one in found if one["fits"]]
    if not fitting:
        raise ConfigError(f"no setting fits: {[one['error'] for one in found]}; try --memory full::LAYERS")
    best = min(fitting, key=lambda one: one["step"]["p50_ms"])
    return best | {"tried": [{k: v for k, v in one.items() if k != "kernels"} for one in found if one is not best]}


def extrapolated(config: RunConfig, sparse: Record, device: torch.device) -> Record:
    """A dense step from one call of one layer's attention: all else is taken to last as long as in `sparse`."""
    layer, cp = layers.Layer.of(config, device), ContextParallel(block_backend=config.parallel.block_backend)
    layers.forward_backward(cp.attend, layer.inputs(4096, seed=1))
    inputs = layer.inputs(config.padded_len, seed=1)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    layers.forward_backward(cp.attend, inputs)
    last.record()
    torch.cuda.synchronize()
    layer_ms = first.elapsed_time(last)
    rest_ms = sparse["step"]["p50_ms"] - sparse["parts_ms"][ATTENTION] - sparse["parts_ms"][AROUND]
    step_ms = config.model.num_layers * layer_ms * config.global_batch_size + rest_ms
    return {
        "layer_forward_backward_ms": layer_ms,
        "step_ms": step_ms,
        "tokens_per_s_per_gpu": config.global_batch_size * config.seq_len / step_ms * 1e3,
        "ratio": step_ms / sparse["step"]["p50_ms"],
    }


def read_result(path: Path) -> Record:
    """What this benchmark wrote.

    Raises:
        ConfigError: it is something else, or nothing was timed.
    """
    try:
        result: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a result of benchmarks.train_step") from None
    if not isinstance(result, dict) or result.get("benchmark") != NAME:
        raise ConfigError(f"{path} is not a result of benchmarks.train_step")
    if not result.get("modes"):
        raise ConfigError(f"{path}: nothing was timed, since its check failed; leave it out")
    return result


def row(mode: str, found: Record) -> list[str]:
    """A line of the table under `HEADER`; parts in milliseconds."""
    memory = found["memory"]
    some = memory["recompute_layers"]
    return [
        mode,
        memory["recompute"] + ("" if some is None else f" {some}"),
        str(memory["offload_layers"]),
        f"{found['step']['p50_ms'] / 1e3:.3f}",
        f"{found['tokens_per_s_per_gpu']:,.0f}",
        "-" if found["mfu"] is None else f"{found['mfu']:.1%}",
        "-" if found["gpu_gib"] is None else f"{found['gpu_gib']:.1f}",
        f"{found['offloaded_gib']:.1f}",
        *(f"{found['parts_ms'][part]:,.0f}" if "parts_ms" in found else "-" for part in PARTS),
    ]


if __name__ == "__main__":
    sys.exit(main())
