"""One attention layer on one device, over several lengths: dense SDPA and Lighthouse, in the same run.

    python -m benchmarks.latency CONFIG [--set KEY=VALUE ...] --out FILE.json [--seq-lens 8192,32768,... [--scale-topk]]
        [--repeats 5]

Nothing is timed unless both agree with float64 at a short length, and the kernels with plain PyTorch at each length.
The stages around the attention call are timed alone, too, beside the bytes they must move. Exit codes: 0 done, 1 a
check failed, 2 something that the user can correct.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import layer as layers
from benchmarks import stages
from benchmarks.common import Record, environment, make_way, milliseconds, ratios, setting, table, write_json
from lhcp import config_file
from lhcp.attention import select
from lhcp.config import BlockBackendName, ConfigError, LighthouseConfig
from lhcp.config.section import nearest_multiples
from lhcp.distributed import ContextParallel
from lhcp.distributed.env import ProcessEnv
from lhcp.distributed.exchange.block import block_backend
from lhcp.kernels.lighthouse import kernels_for, reference
from lhcp.metrics import tell

NAME = "latency"
MOST_LENGTHS = 8
HEADER = [
    *("N", "pyramid", "S", "lighthouse ms", "dense ms", "dense / lighthouse"),
    *("dense on S ms", "around ms", "floor ms", "GiB above"),
]
NOTE = """Times and ratios: forward / forward and backward, medians. Around: what Lighthouse takes besides dense
attention on S, measured turn by turn. Floor: the time of the bytes around attention that no division of the work
avoids. GiB above: the peak of forward and backward above q, k, v, the output and the gradients of all."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check and measure; the exit code."""
    try:
        return _main(_arguments(argv))
    except ConfigError as error:
        tell(error)
        return 2


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """`config`, `overrides`, `out`, `seq_lens`, `scale_topk`, `repeats`."""
    parser = argparse.ArgumentParser(prog="benchmarks.latency", description="Time one attention layer on one device.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--seq-lens", metavar="N,N,...", help="lengths; by default up to the configuration's")
    parser.add_argument("--scale-topk", action="store_true", help="topk in proportion to the length")
    parser.add_argument("--repeats", type=int, default=5, help="calls that are timed")
    return parser.parse_args(argv)


def _main(args: argparse.Namespace) -> int:
    if args.repeats < 1:
        raise ConfigError(f"--repeats {args.repeats}: must be at least 1")
    env = ProcessEnv.read()
    if env.world_size > 1:
        raise ConfigError("latency measures one device; start it without torchrun (benchmarks.scaling takes several)")
    config = config_file.load(args.config, args.overrides)
    attention = config.attention.resolve(config.seq_len)
    if args.seq_lens is not None:
        lengths = _given_lengths(args.seq_lens, attention, config.seq_len if args.scale_topk else None)
    elif args.scale_topk:
        raise ConfigError("--scale-topk needs --seq-lens")
    else:
        lengths = {length: attention.resolve(length) for length in default_lengths(attention, config.seq_len)}
    device = env.device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    layer, backend = layers.Layer.of(config, device), config.parallel.block_backend
    block_backend(backend, torch.empty(0, dtype=getattr(torch, layer.dtype), device=device))
    make_way(args.out)
    result = measure(layer, attention, config.seq_len, lengths, backend, args.repeats)
    write_json(args.out, result)
    if not result["check"]["passed"]:
        tell(f"{layers.complaint(result['check'])}; nothing was timed")
        return 1
    print(table(HEADER, map(row, result["lengths"])))
    print(NOTE, setting(result["environment"]))
    return 0


def default_lengths(attention: LighthouseConfig, seq_len: int) -> list[int]:
    """Powers of two times the smallest legal length, up to `seq_len`, which is the last; the longest `MOST_LENGTHS`.

    Args:
        attention: resolved for `seq_len`.
        seq_len: N of the configuration.
    """
    length = attention.coarsest_window * attention.topk  # a stratum must have as many coarsest entries as it selects
    lengths = []
    while length < seq_len:
        if _is_legal(attention, length):  # not where the dilation does not divide it
            lengths.append(length)
        length *= 2
    return [*lengths, seq_len][-MOST_LENGTHS:]


def _is_legal(attention: LighthouseConfig, length: int) -> bool:
    try:
        attention.resolve(length)
    except ConfigError:
        return False
    return True


def _given_lengths(text: str, attention: LighthouseConfig, of: int | None) -> dict[int, LighthouseConfig]:
    """`--seq-lens`, ascending, each with its attention: `attention`'s topk, or that share of it which N is of `of`.

    Raises:
        ConfigError: not numbers, or not legal for `attention`.
    """
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"--seq-lens {text!r}: must be numbers of tokens, such as 8192,32768")
    found = {}
    for length in sorted({int(word) for word in words}):
        scaled = attention
        if of is not None:
            topk, rest = divmod(attention.topk * length, of)
            if rest:
                unit = of // math.gcd(attention.topk, of)
                raise ConfigError(
                    f"--scale-topk: topk {attention.topk} at {of} tokens is no whole number at {length}; "
                    f"nearest legal: {nearest_multiples(length, unit)}"
                )
            # What is derived from topk is derived anew.
            scaled = attention.model_copy(update={"topk": topk, "num_strata": None})
        found[length] = scaled.resolve(length)
    return found


def measure(
    layer: layers.Layer,
    attention: LighthouseConfig,
    seq_len: int,
    lengths: Mapping[int, LighthouseConfig],
    backend: BlockBackendName,
    repeats: int,
) -> Record:
    """Check, then time.

    Args:
        layer: the layer.
        attention: resolved for `seq_len`.
        seq_len: N of the configuration.
        lengths: N and what is measured there, resolved.
        backend: of the attention in Lighthouse; dense attention is PyTorch's SDPA.
        repeats: calls that are timed.

    Returns:
        The result; without `lengths` when a check failed.
    """
    cp = ContextParallel(block_backend=backend)
    short, small = layers.shortened(attention, seq_len, num_chunks=1)
    result: Record = {
        "benchmark": NAME,
        "config": {
            "seq_len": seq_len,
            "block_backend": backend,
            "attention": attention.model_dump(mode="json"),
            "num_heads": layer.num_heads,
            "num_kv_heads": layer.num_kv_heads,
            "head_dim": layer.head_dim,
            "dtype": layer.dtype,
        },
        "check": layers.check(layer, short, small, cp, layers.sdpa, backend),
        "dense_kernel": layers.sdpa_kernel_of(layer),
        "environment": environment(layer.device, layer.dtype),
    }
    if not result["check"]["passed"]:
        return result
    bytes_per_ms = stages.copy_bytes_per_ms(layer.device, repeats)
    found = []
    for length, at in lengths.items():
        inputs = layer.inputs(length, seed=1)
        outcome = None
        if kernels_for(inputs[0]) is not reference:
            outcome = layers.check_kernels(inputs, at, backend)
            if not outcome["passed"]:
                return result | {"check": outcome}
        found.append(_at(inputs, at, cp, bytes_per_ms, repeats) | {"check": outcome})
    return result | {"copy_tb_per_s": bytes_per_ms / 1e9, "lengths": found}


def _at(
    inputs: Sequence[Tensor], attention: LighthouseConfig, cp: ContextParallel, bytes_per_ms: float, repeats: int
) -> Record:
    """All times at one length."""
    length = inputs[0].shape[1]
    sparse = layers.measure(layers.lighthouse(attention, cp), inputs, repeats)
    tensors = 2 * sum(x.nbytes for x in inputs)  # q, k, v, the output, and the gradients of all
    on_gpu = inputs[0].is_cuda  # else the peak is that of the process
    sparse["memory_above_gib"] = sparse["peak_memory_gib"] - tensors / 2**30 if on_gpu else None

    q, k, v, _ = inputs
    selection = select(q, k, attention, v=v, context_parallel=cp)
    alone = stages.measure(inputs, selection, bytes_per_ms, repeats)
    least = stages.least_bytes(selection.pyramid, selection.entries.shape[-1], (q, k, v))
    around = stages.around(layers.lighthouse(attention, cp), inputs, selection, repeats)
    dense = layers.measure(layers.sdpa, inputs, repeats)
    return {
        "seq_len": length,
        "subsequence_length": attention.subsequence_length(length),
        "attention": attention.model_dump(mode="json"),
        "lighthouse": sparse,
        "dense": dense,
        **around,
        "stages": alone,
        "floor_ms": {kind: moved / bytes_per_ms for kind, moved in least.items()},
        "ratio": layers.ratio(dense, sparse),
    }


def row(result: Record) -> list[str]:
    """A line of the table under `HEADER`, of one element of `lengths`."""
    attention, above = result["attention"], result["lighthouse"]["memory_above_gib"]
    return [
        f"{result['seq_len']:,}",
        f"L{attention['num_levels']} p{attention['pooling_factor']} k{attention['topk']}",
        f"{result['subsequence_length']:,}",
        milliseconds(result["lighthouse"]),
        milliseconds(result["dense"]),
        ratios(result["ratio"]),
        milliseconds(result["dense_on_subsequence"]),
        milliseconds(result["around"]),
        f"{result['floor_ms']['forward']:.2f} / {result['floor_ms']['forward_backward']:.2f}",
        "-" if above is None else f"{above:.2f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
