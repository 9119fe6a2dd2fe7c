"""One attention layer over the ranks of a context-parallel group: Lighthouse and dense, one length and degree a run.

    torchrun ... -m benchmarks.scaling CONFIG [--set KEY=VALUE ...] --out FILE.json [--repeats 5] [--no-dense]
    python -m benchmarks.scaling report DIR [--expect NAMES_FILE]

Nothing is timed unless the attention over the ranks is that of one process. `report` merges the results of a sweep.
Exit codes: 0 done, 1 a check failed or a result is missing, 2 something that the user can correct.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import layer as layers
from benchmarks.common import (
    NO_RESULT,
    Record,
    check_folder,
    document,
    environment,
    make_way,
    milliseconds,
    ratios,
    read_names,
    setting,
    table,
    tell,
    write_json,
    write_text,
)
from lhcp import config_file
from lhcp.config import ConfigError, RunConfig
from lhcp.distributed.collectives import SharedError, on_rank_zero
from lhcp.distributed.env import ProcessEnv, process_group
from lhcp.distributed.exchange.block import block_backend
from lhcp.parallelize import Mesh

NAME = "scaling"
REPORT_FILE = "scaling.md"
HEADER = ["element", "N", "cp", "lighthouse ms", "dense ms", "dense / lighthouse", "tokens/s per rank", "memory GiB"]
NOTES = (
    "One layer, B = 1. Times and ratios: forward / forward and backward, medians, of the slowest rank.",
    "tokens/s per rank: Lighthouse, forward and backward. memory: peak of the largest rank with Lighthouse.",
)


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
    """`config`, `overrides`, `out`, `repeats`, `dense`."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.scaling",
        description="Time one attention layer as one rank of a group, Lighthouse and dense.",
        epilog="`report DIR [--expect NAMES_FILE]` merges the results in DIR.",
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--repeats", type=int, default=5, help="calls that are timed")
    parser.add_argument("--no-dense", action="store_false", dest="dense", help="leave dense attention out")
    return parser.parse_args(argv)


def _report_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """`folder`, `expect`."""
    parser = argparse.ArgumentParser(prog="benchmarks.scaling report", description="Merge the results of a sweep.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--expect", type=Path, metavar="NAMES_FILE", help="names of results that must be there")
    return parser.parse_args(argv)


def _measure_main(args: argparse.Namespace) -> int:
    if args.repeats < 1:
        raise ConfigError(f"--repeats {args.repeats}: must be at least 1")
    env = ProcessEnv.read()
    config = config_file.load(args.config, args.overrides).resolve(env.world_size)
    attention = config.attention.resolve(config.seq_len, config.parallel.num_chunks)  # also where no stage uses it
    config = config.model_copy(update={"attention": attention})
    device = env.device(config.device)
    dtype = getattr(torch, config.activation_dtype)
    block_backend(config.parallel.block_backend, torch.empty(0, dtype=dtype, device=device))
    with process_group(env, device):
        on_rank_zero(lambda: make_way(args.out))
        result = measure(config, device, args.repeats, args.dense)
        on_rank_zero(lambda: write_json(args.out, result))
        if env.rank == 0:
            _tell(args.out, result)
    return 0 if result["check"]["passed"] else 1


def _tell(out: Path, result: Record) -> None:
    if result["check"]["passed"]:
        print(table(HEADER, [_Element.of(out.stem, result).row]), end="", flush=True)
    else:
        tell(f"{layers.complaint(result['check'])}; nothing was timed")


def measure(config: RunConfig, device: torch.device, repeats: int, with_dense: bool = True) -> Record:
    """Check, then time (collective).

    Args:
        config: resolved, its attention too.
        device: of this rank.
        repeats: calls that are timed.
        with_dense: time dense attention as well.

    Returns:
        The result; without `lighthouse`, `dense` and `ratio` when the check failed.
    """
    cp = Mesh.build(config.parallel, device).context_parallel
    layer = layers.Layer.of(config, device)
    length, attention = layers.shortened(config.attention, config.seq_len, config.parallel.num_chunks)
    result: Record = {
        "benchmark": NAME,
        "config": _settings(config),
        "check": layers.check(layer, length, attention, cp, cp.attend, config.parallel.block_backend),
        "environment": environment(device, layer.dtype),
    }
    if not result["check"]["passed"]:
        return result
    tokens = config.seq_len // cp.size
    inputs = layer.inputs(tokens, seed=1 + cp.rank)
    sparse = layers.measure(layers.lighthouse(config.attention, cp), inputs, repeats)
    sparse["tokens_per_s_per_rank"] = tokens / sparse["forward_backward"]["p50_ms"] * 1e3
    dense = layers.measure(cp.attend, inputs, repeats) if with_dense else None
    return result | {"lighthouse": sparse, "dense": dense, "ratio": layers.ratio(dense, sparse) if dense else None}


def _settings(config: RunConfig) -> Record:
    """What counts of a configuration here."""
    model = config.model
    return {
        "seq_len": config.seq_len,
        "subsequence_length": config.attention.subsequence_length(config.seq_len),
        **config.parallel.model_dump(mode="json"),
        "attention": config.attention.model_dump(mode="json"),
        "num_heads": model.num_heads,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "dtype": config.activation_dtype,
        "device": config.device,
    }


@dataclass(frozen=True, order=True)
class _Element:
    """A result as the report shows it, in its order."""

    seq_len: int
    cp: int
    name: str
    row: list[str]
    setting: str

    @classmethod
    def of(cls, name: str, result: Record) -> _Element:
        """From a result whose check passed.

        Raises:
            KeyError, TypeError, ValueError: it is not whole.
        """
        config, sparse = result["config"], result["lighthouse"]
        row = [
            name,
            f"{config['seq_len']:,}",
            f"{config['cp']:,}",
            milliseconds(sparse),
            milliseconds(result["dense"]),
            ratios(result["ratio"]),
            f"{sparse['tokens_per_s_per_rank']:,.0f}",
            f"{sparse['peak_memory_gib']:.2f}",
        ]
        return cls(config["seq_len"], config["cp"], name, row, setting(result["environment"]))


def report(folder: Path, expected: Sequence[str]) -> int:
    """Merge the results in `folder` into its `REPORT_FILE` and print that; 1 when one is missing or failed.

    Raises:
        ConfigError: no such folder, or it cannot be written to.
    """
    check_folder(folder)
    elements, problems, foreign = _read(folder, expected)
    notes = [*NOTES, *sorted({element.setting for element in elements})]
    notes += [f"Left out, since not a result of this benchmark: {', '.join(foreign)}."] if foreign else []
    rows = table(HEADER, [element.row for element in sorted(elements)])
    text = document("Scaling of one attention layer", rows, notes, problems)
    write_text(folder / REPORT_FILE, text)
    print(text, end="")
    return 1 if problems or not elements else 0


def _read(folder: Path, expected: Sequence[str]) -> tuple[list[_Element], dict[str, str], list[str]]:
    """The results in a folder; what is wrong with others, by name; files that are something else."""
    elements: list[_Element] = []
    problems = dict.fromkeys(expected, NO_RESULT)
    foreign: list[str] = []
    for path in sorted(folder.glob("*.json")):
        name = path.stem
        try:
            result = json.loads(path.read_bytes())
            if not isinstance(result, dict) or result.get("benchmark") != NAME:
                if name in problems:
                    problems[name] = f"{path.name} is not a result of this benchmark"
                else:
                    foreign.append(path.name)
            elif result["check"]["passed"] is not True:
                problems[name] = layers.complaint(result["check"])
            else:
                elements.append(_Element.of(name, result))
                problems.pop(name, None)
        except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
            problems[name] = f"{path.name} is damaged ({type(error).__name__}: {error})"
    return elements, problems, foreign


if __name__ == "__main__":
    sys.exit(main())
