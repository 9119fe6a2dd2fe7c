"""A small run on real text, as configurations and trainers of any layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lhcp.checkpoint.manifest import Checkpoint
from lhcp.config import RunConfig
from lhcp.data import prepare
from lhcp.parallelize import Mesh
from lhcp.trainer import Trainer


def write_data(folder: Path) -> Path:
    """Tokens of a few kilobytes of real text: the paragraphs of the licence, without runs of spaces.

    Where a sequence begins with a run of one token, attention gives each of them the same value, so their rows tie
    in every layer up to rounding. Elsewhere in float64, contexts tell equal tokens apart.
    """
    paragraphs = (Path(__file__).parents[1] / "LICENSE").read_text().split("\n\n")
    lines = [json.dumps({"text": " ".join(paragraph.split())}) for paragraph in paragraphs]
    (folder / "licence.jsonl").write_text("\n".join(lines))
    prepare([folder / "licence.jsonl"], folder / "tokens", held_out=0.3)
    return folder / "tokens"


def make_config(data: Path, dp: int, cp: int, **changes: Any) -> RunConfig:
    """Three layers of width 24, GQA, sequences of 360 tokens: 8 strata of 45, 5 coarsest entries each.

    Layer 0 is dense: there the norm of a row depends on its token alone, so equal tokens tie up to the rounding
    of the projections, and which of them is selected would depend on the shapes of the matrix products.
    """
    values: dict[str, Any] = {
        "output_dir": data.parent / "run",
        "seq_len": 360,
        "global_batch_size": 4,
        "dtype": "float64",
        "device": "cpu",
        "model": {"vocab_size": 257, "dim": 24, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6,
                  "ffn_dim": 40},
        "data": {"path": data},
        "attention": {"num_levels": 3, "pooling_factor": 3, "topk": 24, "num_strata": 8},
        "dense_layers": [0],
        "optim": {"warmup_steps": 3, "lr": 3e-3},
        "parallel": {"dp": dp, "cp": cp},
        "stages": [{"mode": "lighthouse", "steps": 10}, {"mode": "dense", "steps": 10}],
        "eval": {"sequences": 2},
    }  # fmt: skip
    return RunConfig.model_validate(values | changes).resolve(dp * cp)


def make_trainer(config: RunConfig, checkpoint: Checkpoint | None = None) -> Trainer:
    device = torch.device("cpu")
    return Trainer(config, Mesh.build(config.parallel, device), device, checkpoint)


def largest_error(values: dict[str, Tensor], references: dict[str, Tensor]) -> float:
    assert values.keys() == references.keys()
    errors = [(values[n] - references[n]).norm() / references[n].norm() for n in references]
    return float(torch.stack(errors).max())  # not a number where one of them is not
