"""One attention layer over the ranks of a context-parallel group: Lighthouse and dense, one length and degree a run.

    torchrun ... -m benchmarks.scaling CONFIG [--set KEY=VALUE ...] --out FILE.json [--exchanges ring,ulysses]
    python -m benchmarks.scaling CONFIG --emulate 8 --out FILE.json
    python -m benchmarks.scaling report DIR [--expect NAMES_FILE]

Nothing is timed unless the attention over the ranks is that of one process; with `--repeats 0` that is all. `--emulate
W` runs each of W ranks' share in turn on one device, without the others, and projects what transfers would add.
`report` merges results.
Exit codes: 0 done, 1 a check failed or a result is missing, 2 something that the user can correct.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from torch.distributed import ProcessGroup

from benchmarks import layer as layers
from benchmarks import shares
from benchmarks.common import Record, environment, make_way, read_names, write_json
from benchmarks.scaling_report import NAME, report, tables
from lhcp import config_file
from lhcp.config import ConfigError, ExchangeName, RunConfig
from lhcp.distributed import ContextParallel
from lhcp.distributed.collectives import SharedError, on_rank_zero
from lhcp.distributed.env import ProcessEnv, process_group
from lhcp.distributed.exchange.block import block_backend
from lhcp.distributed.threads import ThreadCommunicator, run_threads
from lhcp.metrics import tell
from lhcp.parallelize import Mesh


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as one rank, or report; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["report"]:
            args = _report_arguments(argv[1:])
            return report(args.folder, read_names(args.expect))
        return _measure_main(_arguments(argv))
    except SharedError as error:
        if ProcessEnv.read().rank == 0:
            tell(error)
    except ConfigError as error:
        if ProcessEnv.read().rank == 0:
            tell(error)
        else:
            time.sleep(2)  # torchrun ends every rank when one has ended: let rank 0 speak first
    return 2


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    """`config`, `overrides`, `out`, `repeats`, `dense`, `exchanges`, `emulate`."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.scaling",
        description="Time one attention layer as one rank of a group, Lighthouse and dense.",
        epilog="`report DIR [--expect NAMES_FILE]` merges the results in DIR.",
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--repeats", type=int, default=5, help="calls that are timed; 0: none, check alone")
    parser.add_argument("--no-dense", action="store_false", dest="dense", help="leave dense attention out")
    parser.add_argument("--exchanges", metavar="NAME,...", help="exchanges to measure; left out: the configuration's")
    parser.add_argument("--emulate", type=int, metavar="W", help="each of W ranks alone, on this one device")
    return parser.parse_args(argv)


def _report_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """`folder`, `expect`."""
    parser = argparse.ArgumentParser(prog="benchmarks.scaling report", description="Merge the results of a sweep.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--expect", type=Path, metavar="NAMES_FILE", help="names of results that must be there")
    return parser.parse_args(argv)


def _measure_main(args: argparse.Namespace) -> int:
    if args.repeats < 0:
        raise ConfigError(f"--repeats {args.repeats}: must be at least 0, which checks and times nothing")
    env, emulated = ProcessEnv.read(), args.emulate is not None
    if emulated and (args.emulate < 2 or env.world_size > 1):
        raise ConfigError(f"--emulate {args.emulate}: takes 2 ranks or more, on one device; start it without torchrun")
    if emulated and "ring_flash_attn" in (args.exchanges or ""):
        raise ConfigError("ring_flash_attn cannot be emulated, since its transfers are its own; leave it out")
    overrides = [*args.overrides, *([f"parallel.cp={args.emulate}", "parallel.dp=1"] if emulated else [])]
    config = config_file.load(args.config, overrides)
    exchanges, cp, seq_len = _exchanges(args.exchanges, config), config.parallel.cp, config.seq_len
    if cp > env.world_size == 1 and not emulated:
        raise ConfigError(
            f"parallel.cp {cp}: start it by torchrun --nproc-per-node {cp}, emulate the ranks (--emulate {cp}), or set "
            f"parallel.cp=1"
        )
    config = _resolved(config, exchanges, args.emulate or env.world_size)
    device = env.device(config.device)
    dtype = getattr(torch, config.activation_dtype)
    block_backend(config.parallel.block_backend, torch.empty(0, dtype=dtype, device=device))
    if emulated:
        make_way(args.out)
        result = emulate(config, exchanges, device, args.repeats, args.dense)
        write_json(args.out, result)
    else:
        with process_group(env, device):
            on_rank_zero(lambda: make_way(args.out))
            result = measure(config, exchanges, device, args.repeats, args.dense)
            on_rank_zero(lambda: write_json(args.out, result))
    if env.rank == 0 and config.seq_len > seq_len:
        print(f"sequences of {seq_len:,} tokens are padded to {config.seq_len:,}")
    if env.rank == 0 and result["check"]["passed"]:
        print(tables({args.out.stem: result}), end="", flush=True)
    elif env.rank == 0:
        tell(f"{layers.complaint(result['check'])}; nothing was timed")
    return 0 if result["check"]["passed"] else 1


def _exchanges(given: str | None, config: RunConfig) -> list[ExchangeName]:
    if given is None:
        return [config.parallel.exchange]
    known: dict[str, ExchangeName] = {name: name for name in get_args(ExchangeName)}
    names = [name.strip() for name in given.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"--exchanges {','.join(unknown)}: valid are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def _resolved(config: RunConfig, exchanges: Sequence[ExchangeName], ranks: int) -> RunConfig:
    """Resolved for every one of the exchanges, its attention too, at the length that sequences are padded to."""
    found = config
    for exchange in exchanges:
        parallel = config.parallel.model_copy(update={"exchange": exchange})
        found = config.model_copy(update={"parallel": parallel}).resolve(ranks)
    attention = found.attention.resolve_padded(found.seq_len, found.parallel.num_chunks)  # also where no stage uses it
    return found.model_copy(update={"attention": attention, "seq_len": attention.padded_length(found.seq_len)})


def measure(
    config: RunConfig, exchanges: Sequence[ExchangeName], device: torch.device, repeats: int, with_dense: bool = True
) -> Record:
    """Check every exchange, then time (collective).

    Args:
        config: resolved, its attention too.
        exchanges: names.
        device: of this rank.
        repeats: calls that are timed; 0: none, only checked.
        with_dense: time dense attention as well.

    Returns:
        The result; without `one_device` and `exchanges` when nothing was timed.
    """
    group = Mesh.build(config.parallel, device).context_parallel.group
    return _result(config, exchanges, device, repeats, with_dense, group)


def emulate(
    config: RunConfig, exchanges: Sequence[ExchangeName], device: torch.device, repeats: int, with_dense: bool = True
) -> Record:
    """Check every exchange with threads as ranks, then time each rank's share, in one process; see `measure`."""
    return _result(config, exchanges, device, repeats, with_dense, None)


def _result(
    config: RunConfig,
    exchanges: Sequence[ExchangeName],
    device: torch.device,
    repeats: int,
    with_dense: bool,
    group: ProcessGroup | None,
) -> Record:
    layer = layers.Layer.of(config, device)
    result: Record = {
        "benchmark": NAME,
        "emulated": group is None,
        "config": _settings(config),
        "environment": environment(device, layer.dtype),
    }
    checks = {exchange: _check(config, exchange, layer, group) for exchange in exchanges}
    result["check"] = {
        **checks[exchanges[0]],
        "passed": all(check["passed"] for check in checks.values()),
        **{
            part: {f"{exchange} {name}": value for exchange in checks for name, value in checks[exchange][part].items()}
            for part in ("errors", "alone", "tolerances")
        },
    }
    if not result["check"]["passed"] or repeats == 0:
        return result
    result["one_device"] = shares.one_device(config, layer, repeats, with_dense)
    result["exchanges"] = {
        exchange: shares.emulated(config, exchange, layer, repeats, with_dense)
        if group is None
        else shares.measured(config, exchange, layer, repeats, with_dense, group)
        for exchange in exchanges
    }
    return result


def _check(config: RunConfig, exchange: ExchangeName, layer: layers.Layer, group: ProcessGroup | None) -> Record:
    parallel = config.parallel
    length, attention = layers.shortened(config.attention, config.seq_len, parallel.num_chunks)

    def of(cp: ContextParallel) -> Record:
        return layers.check(layer, length, attention, cp, cp.attend, parallel.block_backend)

    if group is not None:
        return of(ContextParallel(group, parallel.sharding, exchange, parallel.block_backend))

    def of_thread(communicator: ThreadCommunicator) -> Record:
        return of(ContextParallel(None, parallel.sharding, exchange, parallel.block_backend, communicator=communicator))

    return layers.worst(layer, run_threads(parallel.cp, of_thread))


def _settings(config: RunConfig) -> Record:
    """What counts of a configuration here."""
    model, parallel = config.model, config.parallel
    return {
        "seq_len": config.seq_len,
        "subsequence_length": config.attention.subsequence_length(config.seq_len),
        **{key: getattr(parallel, key) for key in ("dp", "cp", "sharding", "block_backend")},
        "attention": config.attention.model_dump(mode="json"),
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "dtype": config.activation_dtype,
        "device": config.device,
    }


if __name__ == "__main__":
    sys.exit(main())
