"""The steps of a run, with its checkpoints, evaluations and reports."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable

import torch

from lhcp.checkpoint.saver import MAX_FAILURES, Saved, Saver
from lhcp.config.run import ProfileConfig
from lhcp.flops import peak_flops, step_flops
from lhcp.metrics import HELD_OUT, MetricsLogger, StepMetrics
from lhcp.optim import learning_rate
from lhcp.parallelize import on_any_rank
from lhcp.profiler import StepProfiler
from lhcp.stop import StopRequest
from lhcp.trainer import Trainer

Beat = Callable[[str], None]
"""Tells the watchdog what comes next, at the same places on every rank."""


class SaveError(RuntimeError):
    """Checkpoints cannot be written; the message says why."""


def run(trainer: Trainer, saver: Saver, request: StopRequest, logger: MetricsLogger | None, beat: Beat) -> bool:
    """All steps that are left, with checkpoints and evaluations; only the rank with a `logger` reports (collective).

    Returns:
        Whether the run is finished; else it was told to stop, and has saved.

    Raises:
        SaveError: too many checkpoints in a row could not be written, or the last one could not.
        FloatingPointError: too many steps in a row were not finite.
    """
    config = trainer.config
    profile = config.profile if logger is not None else ProfileConfig()
    with StepProfiler(profile, config.output_dir, trainer.device) as profiler:
        return _all_steps(trainer, saver, request, logger, profiler, beat)


def _all_steps(
    trainer: Trainer,
    saver: Saver,
    request: StopRequest,
    logger: MetricsLogger | None,
    profiler: StepProfiler,
    beat: Beat,
) -> bool:
    """See `run`."""
    total, every = trainer.config.total_steps, trainer.config.checkpoint.every
    _evaluate_if_due(trainer, logger, beat)  # a kill may have come between this checkpoint and its evaluation
    while trainer.done < total:
        beat(f"in step {trainer.done + 1}")
        try:
            _step(trainer, logger, profiler)
        except FloatingPointError:
            beat(f"in the save after step {trainer.done}")
            _report(saver.collect(block=True), logger)  # the one being written is still good
            _end_profile(trainer, profiler)
            raise
        stopping = on_any_rank(request.signal is not None, trainer.device)
        due = stopping or trainer.done == total or (every > 0 and trainer.done % every == 0)
        if due:
            beat(f"in the save after step {trainer.done}")
        _report(saver.collect(block=due), logger)
        if due:
            if saver.failed:
                raise SaveError(f"the last {MAX_FAILURES} checkpoints could not be written: {saver.last_error}")
            saver.start(trainer.state(), trainer.manifest())
        if stopping:
            _finish(trainer, saver, logger, profiler, beat)
            return False
        _evaluate_if_due(trainer, logger, beat)
    _finish(trainer, saver, logger, profiler, beat)
    return True


def _step(trainer: Trainer, logger: MetricsLogger | None, profiler: StepProfiler) -> None:
    config, step = trainer.config, trainer.done
    with profiler.step(step + 1):
        started = time.perf_counter()
        loss, norm = trainer.train_step()
        step_s = time.perf_counter() - started
    if logger is None:
        return
    mode = config.stage_at(step).mode
    world = trainer.mesh.ranks.size()
    step_tokens = config.global_batch_size * config.seq_len
    bf16_on_gpu = trainer.device.type == "cuda" and config.activation_dtype == "bfloat16"
    peak = peak_flops(torch.cuda.get_device_name(trainer.device)) if bf16_on_gpu else None
    logger.log(
        StepMetrics(
            step=step,
            stage=mode,
            loss=loss,
            grad_norm=norm,
            lr=learning_rate(config.optim, step),
            tokens=(step + 1) * step_tokens,
            tokens_per_s_per_gpu=step_tokens / step_s / world,
            mfu=step_flops(config, mode) / (step_s * world * peak) if peak else None,
            memory_gib=peak_memory_gib(trainer.device),
            step_s=step_s,
        )
    )
    if trainer.skipped_in_a_row:
        logger.event("skipped", loss=loss, grad_norm=norm)


def _evaluate_if_due(trainer: Trainer, logger: MetricsLogger | None, beat: Beat) -> None:
    evaluation, done = trainer.config.eval, trainer.done
    last = done == trainer.config.total_steps
    if done and evaluation.sequences and (last or (evaluation.every and done % evaluation.every == 0)):
        for mode in evaluation.modes:
            beat(f"in the {mode} evaluation after step {done}")
            loss = trainer.held_out(mode)
            if logger is not None:
                logger.event(HELD_OUT if mode == "dense" else f"{HELD_OUT}_{mode}", step=done - 1, loss=loss)


def _report(saved: Saved | None, logger: MetricsLogger | None) -> None:
    if saved is None:
        return
    logging.info("checkpoint after %d steps: %s, %.1f s", saved.step, saved.error or "published", saved.seconds)
    if logger is not None:
        if saved.error:
            logger.event("checkpoint_failed", step=saved.step - 1, error=saved.error)
        else:
            logger.event("checkpoint", step=saved.step - 1, seconds=saved.seconds)


def _finish(trainer: Trainer, saver: Saver, logger: MetricsLogger | None, profiler: StepProfiler, beat: Beat) -> None:
    """Wait for the last save; meanwhile write the steps that are profiled, where the run ends among them."""
    beat(f"in the save after step {trainer.done}")
    _end_profile(trainer, profiler)
    saved = saver.collect(block=True)
    _report(saved, logger)
    if saved is not None and saved.error:
        raise SaveError(f"the checkpoint after {saved.step} steps could not be written: {saved.error}")


def _end_profile(trainer: Trainer, profiler: StepProfiler) -> None:
    """Write what is recorded; the other ranks wait, since torchrun kills ranks that long outlive one (collective)."""
    profiler.close()
    if trainer.config.profile.range is not None:
        on_any_rank(False, trainer.device)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
