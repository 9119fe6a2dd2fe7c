"""Evaluating a checkpoint: `torchrun ... -m lhcp.eval REQUEST FILE`, as `lhcp eval` starts it, one process per rank.

REQUEST is an `EvalRequest` as JSON; rank 0 writes the result to FILE, as JSON. Exit codes: 0 done, 2 something that the
user can correct.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lhcp.checkpoint.choose import damage
from lhcp.checkpoint.state import load
from lhcp.checks import data_entry
from lhcp.config import ConfigError, RunConfig
from lhcp.data import TokenDataset, verify_shards
from lhcp.distributed.collectives import SharedError, complaints
from lhcp.distributed.env import ProcessEnv, process_group
from lhcp.environment import now, versions
from lhcp.eval.held_out import held_out_loss
from lhcp.eval.passkey import passkeys_found
from lhcp.eval.request import Case, EvalRequest, Prepared, prepare
from lhcp.metrics import tell
from lhcp.model.llama import Llama
from lhcp.modes import attention_of
from lhcp.parallelize import Mesh, prepare_layers, shard_model

Record = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Evaluate as one rank; the exit code."""
    text, result_file = sys.argv[1:] if argv is None else argv
    request = EvalRequest.model_validate_json(text)
    rank = int(os.environ.get("RANK", "0"))
    try:
        env = ProcessEnv.read()
        prepared = prepare(request)
        device = env.device(prepared.cases[0].config.device)
    except ConfigError as error:
        if rank == 0:
            tell(error)
        else:
            time.sleep(2)  # torchrun ends every rank when one has ended: let rank 0 speak first
        return 2
    with process_group(env, device):
        try:
            result = evaluate(request, prepared, device)
        except ConfigError as error:
            if rank == 0 or not isinstance(error, SharedError):
                tell(error)
            return 2
    if rank == 0:
        Path(result_file).write_text(json.dumps(result), encoding="utf-8")
    return 0


def evaluate(request: EvalRequest, prepared: Prepared, device: torch.device) -> Record:
    """The result of a request, the same on every rank (collective).

    Raises:
        ConfigError: the checkpoint is damaged, or has too little data.
    """
    checkpoint, config = prepared.checkpoint, prepared.cases[0].config
    if found := damage(checkpoint.folder):
        raise SharedError(found[0])
    if request.task == "loss" and config.data.verify:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        if found := complaints(lambda: verify_shards(config.data.path, rank, ranks)):
            raise SharedError(found[0])
    mesh = Mesh.build(config.parallel, device)
    model = Llama(config.model).to(device=device, dtype=getattr(torch, config.dtype))
    prepare_layers(model, config, device)
    shard_model(model, mesh, getattr(torch, config.activation_dtype))
    load(checkpoint, model, None)
    rows = [row for case in prepared.cases for row in _rows(request, prepared, case, model, mesh)]
    manifest = checkpoint.manifest
    return {
        "task": request.task,
        "checkpoint": str(checkpoint.folder),
        "step": manifest.step,
        "stage": manifest.stage,
        "seed": request.seed,
        "rows": rows,
        "data": data_entry(config).fingerprint if request.task == "loss" else None,
        "environment": _environment(config, device),
    }


def _rows(request: EvalRequest, prepared: Prepared, case: Case, model: Llama, mesh: Mesh) -> list[Record]:
    config, samples = case.config, prepared.samples
    attention = attention_of(config, case.attended, mesh.context_parallel)
    row: Record = {"mode": case.mode, "attended": case.attended, "length": config.seq_len, "samples": samples}
    if request.task == "loss":
        dataset = TokenDataset(config.data.path, "held_out")
        return [row | {"loss": held_out_loss(model, dataset, config, attention, mesh)}]
    longest = max(other.config.seq_len for other in prepared.cases)
    return [
        row
        | {
            "depth": depth,
            "found": passkeys_found(
                model, config, attention, mesh, depth=depth, samples=samples, seed=request.seed, at_once=longest
            ),
        }
        for depth in request.depths
    ]


def _environment(config: RunConfig, device: torch.device) -> Record:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    parallel = config.parallel
    return {"time": now(), "device": name, "dtype": config.activation_dtype, "dp": parallel.dp, "cp": parallel.cp,
            "versions": versions()}  # fmt: skip


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
