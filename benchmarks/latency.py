"""One attention layer on one device, over several lengths: dense SDPA and Lighthouse, in the same run.

    python -m benchmarks.latency CONFIG [--set KEY=VALUE ...] --out FILE.json [--seq-lens 8192,32768,...] [--repeats 5]

Nothing is timed unless both agree with float64 at a short length. Exit codes: 0 done, 1 the check failed, 2 something
that the user can correct.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import layer as layers
from benchmarks.common import Record, environment, make_way, milliseconds, ratios, setting, table, tell, write_json
from lhcp import config_file
from lhcp.config import BlockBackendName, ConfigError, LighthouseConfig
from lhcp.distributed import ContextParallel
from lhcp.distributed.env import ProcessEnv
from lhcp.distributed.exchange.block import block_backend

NAME = "latency"
MOST_LENGTHS = 8
HEADER = ["N", "S", "lighthouse ms", "dense ms", "dense / lighthouse", "lighthouse GiB", "dense GiB"]


def main(argv: Sequence[str] | None = None) -> int:
    """Check and measure; the exit code."""
    try:
        return _main(_arguments(argv))
    except ConfigError as error:
        tell(error)
        return 2


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """`config`, `overrides`, `out`, `seq_lens`, `repeats`."""
    parser = argparse.ArgumentParser(prog="benchmarks.latency", description="Time one attention layer on one device.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--seq-lens", metavar="N,N,...", help="lengths; by default up to the configuration's")
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
    lengths = _given_lengths(args.seq_lens, attention) if args.seq_lens else default_lengths(attention, config.seq_len)
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
    print(table(HEADER, map(_row, result["lengths"])))
    print("Times and ratios: forward / forward and backward, medians.", setting(result["environment"]))
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


def _given_lengths(text: str, attention: LighthouseConfig) -> list[int]:
    """`--seq-lens`, ascending.

    Raises:
        ConfigError: not numbers, or not legal for `attention`.
    """
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"--seq-lens {text!r}: must be numbers of tokens, such as 8192,32768")
    lengths = sorted({int(word) for word in words})
    for length in lengths:
        attention.resolve(length)
    return lengths


def measure(
    layer: layers.Layer,
    attention: LighthouseConfig,
    seq_len: int,
    lengths: Sequence[int],
    backend: BlockBackendName,
    repeats: int,
) -> Record:
    """Check, then time.

    Args:
        layer: the layer.
        attention: resolved for `seq_len`.
        seq_len: N of the configuration.
        lengths: legal for `attention`.
        backend: of the attention in Lighthouse; dense attention is PyTorch's SDPA.
        repeats: calls that are timed.

    Returns:
        The result; without `lengths` when the check failed.
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
        "environment": environment(layer.device, layer.dtype),
    }
    if result["check"]["passed"]:
        sparse = layers.lighthouse(attention, cp)
        result["lengths"] = [_at(layer, attention, sparse, length, repeats) for length in lengths]
    return result


def _at(
    layer: layers.Layer, attention: LighthouseConfig, sparse: layers.Attention, length: int, repeats: int
) -> Record:
    inputs = layer.inputs(length, seed=1)
    times = {
        "lighthouse": layers.measure(sparse, inputs, repeats),
        "dense": layers.measure(layers.sdpa, inputs, repeats),
    }
    return {
        "seq_len": length,
        "subsequence_length": attention.subsequence_length(length),
        **times,
        "ratio": layers.ratio(times["dense"], times["lighthouse"]),
    }


def _row(result: Record) -> list[str]:
    return [
        f"{result['seq_len']:,}",
        f"{result['subsequence_length']:,}",
        milliseconds(result["lighthouse"]),
        milliseconds(result["dense"]),
        ratios(result["ratio"]),
        f"{result['lighthouse']['peak_memory_gib']:.2f}",
        f"{result['dense']['peak_memory_gib']:.2f}",
    ]


if __name__ == "__main__":
    sys.exit(main())
