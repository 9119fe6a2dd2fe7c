"""Finds bad nodes before a big job: `torchrun ... -m lhcp.preflight --out DIR`, one process a GPU, on all nodes.

Every rank multiplies matrices and copies memory; then all ranks sum, and nodes exchange data in pairs. Rank 0 prints a
table and names the nodes that are slower than the others, differ from them, or failed. DIR/preflight.json has the
figures; DIR/exclude.txt the option for sbatch that leaves bad nodes out, and nothing when there are none. Exit codes: 0
all is well, 1 a node is bad, 2 something that the user can correct.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lhcp.config import ConfigError
from lhcp.distributed.collectives import SharedError, on_rank_zero
from lhcp.distributed.env import ProcessEnv, process_group
from lhcp.environment import now
from lhcp.preflight.judge import NodeFigures, PairFigures, RankFigures, SumFigures, judge
from lhcp.preflight.measure import TIMEOUT, measure_network, measure_rank, progress

LARGEST_MATMUL = 16_384
"""So that products stay whole numbers which bfloat16 holds exactly: a wrong one is a fault of the device."""
HEADER = ("node", "ranks", "device", "TFLOP/s", "copy GB/s", "free GiB", "pairs GB/s", "")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as one rank; the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        args = _arguments(argv)
        return _main(args, ProcessEnv.read())
    except ConfigError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        elif not isinstance(error, SharedError):
            time.sleep(2)  # torchrun ends every rank when one has ended: let rank 0 speak first
        return 2


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """`out`, `device`, `size_mb`, `matmul`, `slow`.

    Raises:
        ConfigError: a number out of range.
    """
    parser = argparse.ArgumentParser(prog="lhcp.preflight", description="Find bad nodes before a big job.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--size-mb", type=int, help="that is copied, sent and summed, 2^20 bytes (256; 8 on CPUs)")
    parser.add_argument("--matmul", type=int, help="rows and columns of the matrices (8192; 512 on CPUs)")
    parser.add_argument("--slow", type=float, default=0.8, help="a node below this share of the median is bad (0.8)")
    args = parser.parse_args(argv)
    for name, value, largest in (("--size-mb", args.size_mb, 2**20), ("--matmul", args.matmul, LARGEST_MATMUL)):
        if value is not None and not 1 <= value <= largest:
            raise ConfigError(f"{name} {value}: must be from 1 to {largest}")
    if not 0 < args.slow <= 1:
        raise ConfigError(f"--slow {args.slow:g}: must be above 0 and at most 1")
    return args


def _main(args: argparse.Namespace, env: ProcessEnv) -> int:
    # Between CPUs, so that a rank whose GPU fails can still say so; GPUs meet in a group of their own.
    with process_group(env, torch.device("cpu"), TIMEOUT):
        on_rank_zero(lambda: args.out.mkdir(parents=True, exist_ok=True))
        if env.rank == 0:
            progress(f"matrix products and copies in {env.world_size} process(es)")
        own = measure_rank(env, args.device, args.matmul, args.size_mb)
        ranks: list[RankFigures] = [own] * env.world_size
        dist.all_gather_object(ranks, own)
        pairs, total = measure_network(ranks, env, args.device, args.size_mb)
        nodes = judge(ranks, pairs, total, args.slow)
        result = _result(args, ranks, pairs, total, nodes)
        on_rank_zero(lambda: _write(args.out, result))
        if env.rank == 0:
            on_gpus = any("nccl" in figures.versions for figures in ranks)
            print(_shown(nodes, total, on_gpus), end="", flush=True)
        dist.barrier()  # torchrun ends every rank when one has ended with 1: rank 0 has spoken
    return 1 if result["exclude"] else 0


def _result(
    args: argparse.Namespace,
    ranks: Sequence[RankFigures],
    pairs: Sequence[PairFigures],
    total: SumFigures | None,
    nodes: Mapping[str, NodeFigures],
) -> dict[str, Any]:
    return {
        "time": now(),
        **{key.lower(): os.environ[key] for key in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST") if key in os.environ},
        "slow": args.slow,
        "nodes": {node: asdict(figures) for node, figures in nodes.items()},
        "exclude": [node for node, figures in nodes.items() if figures.reasons],
        "sum": asdict(total) if total else None,
        "pairs": [asdict(pair) for pair in pairs],
        "ranks": [asdict(figures) for figures in ranks],
    }


def _write(folder: Path, result: Mapping[str, Any]) -> None:
    """Each file whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    exclude = f"{_option(result['exclude'])}\n" if result["exclude"] else ""
    for name, text in (("preflight.json", json.dumps(result, indent=2) + "\n"), ("exclude.txt", exclude)):
        partial = folder / f".{name}.tmp"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def _option(bad: Sequence[str]) -> str:
    return f"--exclude={','.join(bad)}"


def _shown(nodes: Mapping[str, NodeFigures], total: SumFigures | None, on_gpus: bool) -> str:
    """The table, the sum over all ranks, why nodes are bad, and the option that leaves them out."""
    rows: list[tuple[str, ...]] = [HEADER]
    for node, figures in nodes.items():
        rates = (figures.gemm_tflops, figures.copy_gb_s, figures.free_gib, figures.pair_gb_s)
        numbers = ("-" if rate is None else f"{rate:,.3g}" if rate < 100 else f"{rate:,.0f}" for rate in rates)
        rows.append((node, str(figures.ranks), figures.device, *numbers, "bad" if figures.reasons else "ok"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if total:
        lines.append(f"all-reduce over {total.ranks} ranks: {total.bus_gb_s:.3g} GB/s bus bandwidth")
    if not on_gpus:
        lines.append("note: these are CPUs: PyTorch sees no GPU on any node")
    lines += [f"{node}: {reason}" for node, figures in nodes.items() for reason in figures.reasons]
    bad = [node for node, figures in nodes.items() if figures.reasons]
    lines.append(_option(bad) if bad else f"no bad node among {len(nodes)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
