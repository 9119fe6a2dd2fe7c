"""Training: `torchrun ... -m lhcp.train CONFIG [--set KEY=VALUE ...] [--resume WHICH]`, one process per rank.

Configuration and data are checked before any process group or device memory exists. Rank 0 alone writes to the run
folder, except for checkpoints and logs, and prints. Exit codes: 0 finished, 1 failed, 2 something that the user can
correct, `EXIT_STOPPED`, `EXIT_FORCED` and `EXIT_HUNG` of `lhcp.stop`.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from lhcp import config_file, run_folder
from lhcp.checkpoint.choose import choose, damage
from lhcp.checkpoint.compare import check_meaning
from lhcp.checkpoint.manifest import Checkpoint
from lhcp.checkpoint.saver import Saver
from lhcp.checks import check_files, check_host_memory, data_entry
from lhcp.config import ConfigError, RunConfig
from lhcp.data import verify_shards
from lhcp.distributed.collectives import SharedError, complaints, on_rank_zero
from lhcp.distributed.env import ProcessEnv, process_group
from lhcp.distributed.exchange.block import block_backend
from lhcp.distributed.exchange.ring_flash_attn import load_package
from lhcp.lock import locked
from lhcp.metrics import MetricsLogger, tell, warn
from lhcp.parallelize import Mesh
from lhcp.plot import plot_loss
from lhcp.run import SaveError, run
from lhcp.stop import EXIT_REFUSED, EXIT_STOPPED, stop_on_signal
from lhcp.trainer import Trainer
from lhcp.watchdog import collective_timeout, watch


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """`config`, `overrides`, `resume`, `allowed`."""
    parser = argparse.ArgumentParser(prog="lhcp.train", description="Train as one rank of a run.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--resume", metavar="WHICH", help="last, last-good, or the number of steps of a checkpoint")
    parser.add_argument("--allow-change", action="append", default=[], metavar="KEY", dest="allowed")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Train as one rank; the exit code."""
    args = arguments(argv)
    rank = int(os.environ.get("RANK", "0"))
    try:
        env = ProcessEnv.read()
        config = config_file.load(args.config, args.overrides).resolve(env.world_size)
        check_files(config, args.resume, args.allowed)
        device = env.device(config.device)
        if config.deterministic:
            use_deterministic_kernels()
        block_backend(
            config.parallel.block_backend, torch.empty(0, dtype=getattr(torch, config.activation_dtype), device=device)
        )
        if config.parallel.exchange == "ring_flash_attn" and config.parallel.cp > 1:
            load_package()
        config.parallel.check_exchange(config.model, config.activation_dtype, device.type)
        check_host_memory(config, env.local_world_size)
        config.profile.check_device(device.type)
    except ConfigError as error:
        if rank == 0:
            tell(error)
        else:
            time.sleep(2)  # torchrun ends every rank of a node when one has ended: let rank 0 speak first
            if os.environ.get("LOCAL_RANK") == "0":  # of another node, which may be the only one in trouble
                tell(ConfigError(f"on {platform.node()}: {error}"))
        return EXIT_REFUSED

    try:
        return train(config, env, device, args.resume, args.allowed)
    except ConfigError as error:
        if rank == 0 or not isinstance(error, SharedError):
            tell(error)
        return EXIT_REFUSED
    except (FloatingPointError, SaveError) as error:
        if rank == 0:
            tell(error)
        return 1
    except KeyboardInterrupt:
        return 130


def use_deterministic_kernels() -> None:
    """For the whole process; before CUDA is used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS demands it
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, adds nothing


def train(
    config: RunConfig, env: ProcessEnv, device: torch.device, resume: str | None = None, allowed: Collection[str] = ()
) -> int:
    """Train as rank `env.rank` of a resolved and checked configuration; the exit code (collective).

    Raises:
        ConfigError: the run folder is in use; the data or the checkpoint is damaged, or does not fit.
        SaveError, FloatingPointError: see `lhcp.run.run`.
    """
    run_dir, timeout = config.output_dir, collective_timeout(config.hang_timeout_s)
    with ExitStack() as stack:
        request = stack.enter_context(stop_on_signal(config.checkpoint.stop_timeout_s, compiles=device.type == "cuda"))
        watchdog = stack.enter_context(watch(run_dir, env, config.hang_timeout_s))
        watchdog.beat("at the start, waiting for all ranks")
        stack.enter_context(process_group(env, device, timeout))
        on_rank_zero(lambda: stack.enter_context(locked(run_dir)))
        watchdog.fall_back_to(run_folder.log_to(run_dir, env.rank))
        stack.push(_log_end)
        watchdog.beat("at the start, checking the data and the checkpoint")
        checkpoint = _checked_start(config, env, resume, allowed)
        watchdog.beat("at the start, building the model")
        if env.rank == 0 and config.padded_len > config.seq_len:
            print(f"sequences of {config.seq_len:,} tokens are padded to {config.padded_len:,}", flush=True)
        trainer = Trainer(config, Mesh.build(config.parallel, device, timeout), device, checkpoint)
        aside = on_rank_zero(lambda: run_folder.begin(run_dir, config, trainer.done, device))
        saver = Saver(run_dir, config.checkpoint.keep, device, timeout)
        logging.info("rank %d of %d begins with step %d", env.rank, env.world_size, trainer.done + 1)
        logger = None
        if env.rank == 0:
            for path in aside:
                print(f"a newer checkpoint is set aside as {path}")
            logger = stack.enter_context(MetricsLogger(run_dir, config.total_steps, trainer.done))
        finished = run(trainer, saver, request, logger, watchdog.beat)
    if env.rank == 0 and finished:
        plot_loss(run_dir)
    elif env.rank == 0:
        told = request.signal.name if request.signal else "a signal to another rank"
        print(
            f"stopped by {told} after step {trainer.done} of {config.total_steps}, which is saved; "
            f"go on by --resume last",
            flush=True,
        )
    return 0 if finished else EXIT_STOPPED


def _checked_start(
    config: RunConfig, env: ProcessEnv, resume: str | None, allowed: Collection[str]
) -> Checkpoint | None:
    """Check every byte that the run begins with; the checkpoint to go on from, None: the beginning (collective)."""
    if config.data.verify and (found := complaints(lambda: verify_shards(config.data.path, env.rank, env.world_size))):
        raise SharedError(found[0])
    checkpoint = choose(config.output_dir, resume) if resume is not None else None
    if checkpoint is not None:
        chosen = checkpoint
        changes = on_rank_zero(lambda: check_meaning(chosen, config, data_entry(config), allowed))
        if env.rank == 0:
            print(f"resumed from {checkpoint.folder}", flush=True)
            for key, was, value in changes:
                print(f"  changed since: {key} from {was!r} to {value!r}", flush=True)
        return checkpoint
    if resume is not None and env.rank == 0:
        print(f"{config.output_dir} has no checkpoint: the run begins with step 1", flush=True)
    if config.model.init_from is not None:
        if found := damage(config.model.init_from):
            raise SharedError(found[0])
        if env.rank == 0:
            _tell_start(config.model.init_from, config)
    return None


def _tell_start(folder: Path, config: RunConfig) -> None:
    """Say where the weights are from, and when they may have been trained on other tokens than the data."""
    print(f"weights from {folder}", flush=True)
    before, now = Checkpoint.open(folder).manifest, data_entry(config)
    known = before.data.tokenizer if before.data else None
    if known != now.tokenizer and (known or before.model.vocab_size != now.vocab_size):
        warn(
            f"the model in {folder} has {before.model.vocab_size} tokens of {known or 'an unknown'} tokenizer, but the "
            f"data is in {now.vocab_size} tokens of the {now.tokenizer} tokenizer: to the model these are other tokens"
        )


def _log_end(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:  # noqa: ARG001
    """Leave the reason for an end in the log; `ExitStack.push` takes it as `__exit__`."""
    if error is not None:
        logging.error("the run ends", exc_info=error)


if __name__ == "__main__":
    sys.exit(main())
