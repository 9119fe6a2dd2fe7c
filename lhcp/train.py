"""The trainer: `torchrun ... -m lhcp.train CONFIG [--set KEY=VALUE ...]`, one process per rank.

Configuration and data are checked before any process group or device memory exists; then every rank runs
`Trainer.run`. Rank 0 alone writes to the run folder and prints.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lhcp import config_file
from lhcp.attention.layers import LayerAttention
from lhcp.checks import CONFIG_FILE, check_files
from lhcp.config import ConfigError, EvalMode, RunConfig, StageMode
from lhcp.data import BatchLoader, TokenDataset
from lhcp.distributed.env import ProcessEnv, process_group
from lhcp.distributed.exchange.block import block_backend
from lhcp.eval.held_out import held_out_loss, no_attention
from lhcp.flops import peak_flops, step_flops
from lhcp.loss import IGNORE
from lhcp.metrics import HELD_OUT, MetricsLogger, StepMetrics
from lhcp.model.llama import AttentionFunction, Llama
from lhcp.optim import learning_rate, make_optimizer, set_learning_rate
from lhcp.parallelize import Mesh, full, recompute, shard_model, sum_over_ranks
from lhcp.plot import plot_loss


class Trainer:
    """One rank of a run.

    Args:
        config: resolved.
        mesh: the ranks.
        device: of this rank.
    """

    def __init__(self, config: RunConfig, mesh: Mesh, device: torch.device) -> None:
        self.config, self.mesh, self.device = config, mesh, device
        cp = mesh.context_parallel
        self.positions = cp.positions(config.seq_len, device)
        self.loader = BatchLoader(
            TokenDataset(config.data.path, "train"),
            seq_len=config.seq_len,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            seed=config.seed,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            runs=cp.layout.runs(cp.rank, config.seq_len),
        )
        self.model = Llama(config.model).to(device=device, dtype=getattr(torch, config.dtype))
        self.model.init_weights(config.seed)
        recompute(self.model, config.memory.recompute)
        shard_model(self.model, mesh, getattr(torch, config.activation_dtype))
        self.optimizer = make_optimizer(self.model, config.optim)

    def attention(self, mode: StageMode) -> LayerAttention:
        """What the model's layers run in a stage of this mode."""
        lighthouse = self.config.attention if mode == "lighthouse" else None
        return LayerAttention(self.mesh.context_parallel, lighthouse, frozenset(self.config.dense_layers))

    def gradients(self, step: int, attention: AttentionFunction) -> Tensor:
        """Leave the gradients of `step`'s global mean loss in the parameters; return that loss, on every rank."""
        batches = [
            (torch.from_numpy(tokens).to(self.device), torch.from_numpy(labels).to(self.device))
            for tokens, labels in self.loader.micro_batches(step)
        ]
        valid = sum_over_ranks(torch.stack([(labels != IGNORE).sum() for _, labels in batches]).sum())
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device, dtype=getattr(torch, self.config.dtype))
        for tokens, labels in batches:
            loss = self.model(tokens, labels, self.positions, attention) / valid
            loss.backward()
            total += loss.detach()
        return sum_over_ranks(total)

    def train_step(self, step: int) -> tuple[float, float]:
        """One optimizer step (from 0): its loss, and the gradient norm before clipping."""
        optim = self.config.optim
        loss = self.gradients(step, self.attention(self.config.stage_at(step).mode))
        norm = full(torch.nn.utils.clip_grad_norm_(self.model.parameters(), optim.grad_clip))
        if not (loss.isfinite() and norm.isfinite()):  # the same on every rank
            raise FloatingPointError(
                f"step {step + 1}: the loss is {float(loss)} and the gradient norm {float(norm)}, so training has "
                f"diverged; the weights were not updated. Lower optim.lr or lengthen optim.warmup_steps"
            )
        set_learning_rate(self.optimizer, learning_rate(optim, step))
        self.optimizer.step()
        return float(loss), float(norm)

    def held_out(self, mode: EvalMode) -> float:
        """Held-out loss, nats per token."""
        attention = no_attention if mode == "no_attention" else self.attention(mode)
        dataset = TokenDataset(self.config.data.path, "held_out")
        return held_out_loss(self.model, dataset, self.config.seq_len, self.config.eval.sequences, attention, self.mesh)

    def run(self, logger: MetricsLogger | None) -> None:
        """All steps of all stages; only the rank with a `logger` reports."""
        config, evaluation = self.config, self.config.eval
        bf16_on_gpu = self.device.type == "cuda" and config.activation_dtype == "bfloat16"
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if bf16_on_gpu else None
        world = self.mesh.dp_size * self.mesh.context_parallel.size
        for step in range(config.total_steps):
            started = time.perf_counter()
            loss, norm = self.train_step(step)
            step_s = time.perf_counter() - started
            if logger is not None:
                mode = config.stage_at(step).mode
                step_tokens = config.global_batch_size * config.seq_len
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
                        memory_gib=peak_memory_gib(self.device),
                        step_s=step_s,
                    )
                )
            last = step + 1 == config.total_steps
            if evaluation.sequences and (last or (evaluation.every and (step + 1) % evaluation.every == 0)):
                for kind in evaluation.modes:
                    held_out = self.held_out(kind)
                    if logger is not None:
                        logger.event(HELD_OUT if kind == "dense" else f"{HELD_OUT}_{kind}", loss=held_out)


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(argv: Sequence[str] | None = None) -> int:
    """Train as one rank; the exit code is 2 for what the user can correct."""
    parser = argparse.ArgumentParser(prog="lhcp.train", description="Train as one rank of a run.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    args = parser.parse_args(argv)
    rank = int(os.environ.get("RANK", "0"))
    try:
        env = ProcessEnv.read()
        config = config_file.load(args.config, args.overrides).resolve(env.world_size)
        check_files(config)
        device = env.device(config.device)
        block_backend(
            config.parallel.block_backend, torch.empty(0, dtype=getattr(torch, config.activation_dtype), device=device)
        )
    except ConfigError as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # torchrun ends every rank when one has ended: let rank 0 speak first
        return 2

    try:
        return train(config, env, device)
    except ConfigError as error:  # one rank's shard, for instance
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except (FloatingPointError, FileExistsError) as error:
        if env.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 130


def train(config: RunConfig, env: ProcessEnv, device: torch.device) -> int:
    """Train as rank `env.rank` of a resolved and checked configuration."""
    with process_group(env, device):
        trainer = Trainer(config, Mesh.build(config.parallel, device), device)
        if env.rank != 0:
            trainer.run(None)
            return 0
        config.output_dir.mkdir(parents=True, exist_ok=True)
        config_file.save(config, config.output_dir / CONFIG_FILE)
        with MetricsLogger(config.output_dir, config.total_steps) as logger:
            trainer.run(logger)
    plot_loss(config.output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
