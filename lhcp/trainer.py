"""One rank of a run: its share of the model, its batches, and one optimizer step at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lhcp.attention.layers import AttentionFunction
from lhcp.checkpoint.manifest import Checkpoint, Manifest
from lhcp.checkpoint.state import create_moments, load, state_tensors
from lhcp.checks import data_entry
from lhcp.config import EvalMode, RunConfig
from lhcp.data import IGNORE, BatchLoader, TokenDataset
from lhcp.environment import now, versions
from lhcp.eval.held_out import held_out_loss
from lhcp.model.llama import Llama
from lhcp.modes import attention_of
from lhcp.optim import learning_rate, make_optimizer, set_learning_rate
from lhcp.parallelize import Mesh, full, prepare_layers, shard_model, sum_over_ranks


class Trainer:
    """One rank of a run.

    Args:
        config: resolved.
        mesh: the ranks.
        device: of this rank.
        checkpoint: what to go on from; None: the beginning.

    Attributes:
        done: steps done, of the whole run; the next step has this number.
        optimizer_steps: of these, those that updated the weights.
        skipped_in_a_row: the last steps, so many, that were not finite and did not.
    """

    def __init__(
        self, config: RunConfig, mesh: Mesh, device: torch.device, checkpoint: Checkpoint | None = None
    ) -> None:
        self.config, self.mesh, self.device = config, mesh, device
        self.data = data_entry(config)
        cp = mesh.context_parallel
        self.positions = cp.positions(config.padded_len, device)
        self.loader = BatchLoader(
            TokenDataset(config.data.path, "train"),
            seq_len=config.seq_len,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            seed=config.seed,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp_size,
            runs=cp.layout.runs(cp.rank, config.padded_len),
        )
        self.model = Llama(config.model).to(device=device, dtype=getattr(torch, config.dtype))
        if checkpoint is None and config.model.init_from is None:
            self.model.init_weights(config.seed)
        prepare_layers(self.model, config, device)
        shard_model(self.model, mesh, getattr(torch, config.activation_dtype))
        self.optimizer = make_optimizer(self.model, config.optim)
        create_moments(self.optimizer)
        self.done = self.optimizer_steps = self.skipped_in_a_row = 0
        if checkpoint is not None:
            self._resume(checkpoint)
        elif config.model.init_from is not None:
            load(Checkpoint.open(config.model.init_from), self.model, None)

    def _resume(self, checkpoint: Checkpoint) -> None:
        load(checkpoint, self.model, self.optimizer)
        manifest = checkpoint.manifest
        self.done, self.optimizer_steps = manifest.step, manifest.optimizer_steps
        self.skipped_in_a_row = manifest.skipped_in_a_row

    def attention(self, mode: EvalMode) -> list[AttentionFunction]:
        """What each of the model's layers runs in a stage, or an evaluation, of this mode."""
        return attention_of(self.config, mode, self.mesh.context_parallel)

    def gradients(self, step: int, attention: Sequence[AttentionFunction]) -> Tensor:
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

    def train_step(self) -> tuple[float, float]:
        """The next step: its loss, and the gradient norm before clipping; where one is not finite, no update.

        Raises:
            FloatingPointError: too many such steps in a row.
        """
        step, optim = self.done, self.config.optim
        seed_generators(self.config.seed, step, dist.get_rank())
        loss = self.gradients(step, self.attention(self.config.stage_at(step).mode))
        norm = full(torch.nn.utils.clip_grad_norm_(self.model.parameters(), optim.grad_clip))
        if loss.isfinite() and norm.isfinite():  # the same on every rank
            set_learning_rate(self.optimizer, learning_rate(optim, step))
            self.optimizer.step()
            self.optimizer_steps += 1
            self.skipped_in_a_row = 0
        elif self.skipped_in_a_row == optim.max_skipped_steps:
            raise FloatingPointError(
                f"step {step + 1}: the loss is {float(loss)} and the gradient norm {float(norm)}, after "
                f"{self.skipped_in_a_row} such step(s) in a row, so training has diverged. Lower optim.lr or lengthen "
                f"optim.warmup_steps"
            )
        else:
            self.skipped_in_a_row += 1
        self.done += 1
        return float(loss), float(norm)

    def held_out(self, mode: EvalMode) -> float:
        """Held-out loss, nats per token."""
        dataset = TokenDataset(self.config.data.path, "held_out")
        return held_out_loss(self.model, dataset, self.config, self.attention(mode), self.mesh)

    def state(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds as tensors."""
        return state_tensors(self.model, self.optimizer)

    def manifest(self) -> Manifest:
        """Everything else."""
        config = self.config
        return Manifest(
            created=now(),
            step=self.done,
            stage=config.stage_at(self.done - 1).mode,
            seed=config.seed,
            optimizer_steps=self.optimizer_steps,
            skipped_in_a_row=self.skipped_in_a_row,
            model=config.model.model_copy(update={"init_from": None}),
            seq_len=config.seq_len,
            config=config.model_dump(mode="json"),
            data=self.data,
            layout={"dp": self.mesh.dp_size, "cp": self.mesh.context_parallel.size},
            versions=versions(),
        )


def seed_generators(seed: int, step: int, rank: int) -> None:
    """Seed torch for a step, so that whatever draws random numbers in it draws the same after a resume."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]))
