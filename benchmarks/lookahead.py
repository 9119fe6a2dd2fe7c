"""What a Lighthouse stage's loss owes to the future: a selection is made from later tokens too.

    python -m benchmarks.lookahead RUN [--step STEP] [--sequences 64] [--cuts 16] [--out DIR]

At random places of held-out sequences all that follows is replaced by other text. A model that is told nothing of it
predicts the tokens up to there as well as before; the dense one is the control. The difference of the loss, by how far
the predicted token lies behind the place, is what a model loses whose selection tells of a wrong future: what the right
one told it and, since it is misled, more. Writes `lookahead.json` in DIR.
Exit codes: 0 done, 2 something that the user can correct.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from benchmarks.common import Record, document, environment, table, write_json
from lhcp.attention.layers import AttentionFunction
from lhcp.checkpoint.manifest import Checkpoint
from lhcp.checkpoint.resume import find_checkpoint
from lhcp.checkpoint.state import load
from lhcp.checks import check_writable
from lhcp.config import ConfigError
from lhcp.data import TokenDataset
from lhcp.data.loader import read_sequences
from lhcp.distributed import ContextParallel
from lhcp.distributed.env import ProcessEnv
from lhcp.eval.request import Case, EvalRequest, prepare
from lhcp.metrics import tell
from lhcp.model.llama import Llama
from lhcp.modes import attention_of

AT_ONCE = 4
"""Cuts of a forward pass."""
WINDOWS = 2
"""Windows of the coarsest level, behind a cut, in which tokens are compared."""
NOTES = (
    "Losses in nats per token, at the cuts. As trained: with the text that follows. Changed future: with other "
    "text in its place. Behind: tokens from the cut back to the predicted one; 0 is the first that is replaced.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.lookahead", description="What a selection tells of the future.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or a checkpoint")
    parser.add_argument("--step", type=int, help="steps of the checkpoint, if not the newest of the run")
    parser.add_argument("--sequences", type=int, default=64, help="held-out sequences")
    parser.add_argument("--cuts", type=int, default=16, help="cuts in each sequence, one by one")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the result")
    args = parser.parse_args(argv)
    if min(args.sequences, args.cuts) < 2:
        parser.error("--sequences and --cuts must be at least 2")
    try:
        if args.out is not None:
            check_writable("--out", args.out)
        result = measure(find_checkpoint(args.run, args.step), args.sequences, args.cuts)
        if args.out is not None:
            write_json(args.out / "lookahead.json", result)
    except ConfigError as error:
        tell(error)
        return 2
    print(show(result), end="")
    return 0


def measure(checkpoint: Checkpoint, sequences: int, cuts: int) -> Record:
    """The result of both modes at the same cuts.

    Raises:
        ConfigError: the checkpoint is damaged or cannot be evaluated here, or there is too little held-out text.
    """
    checkpoint.verify()
    request = EvalRequest(task="loss", checkpoint=checkpoint.folder, modes=("lighthouse", "dense"), samples=sequences)
    cases = prepare(request).cases
    config = cases[0].config
    if cases[0].attended != "lighthouse" or config.padded_len != config.seq_len:
        raise ConfigError(f"seq_len {config.seq_len}: must suit the Lighthouse configuration without padding")
    device = ProcessEnv.read().device(config.device)
    model = Llama(config.model).to(dtype=getattr(torch, config.dtype))
    load(checkpoint, model, None)
    model.to(device=device, dtype=getattr(torch, config.activation_dtype))
    rows = [_measure(model, case, sequences, cuts, device) for case in cases]
    return {
        "benchmark": "lookahead",
        "step": checkpoint.manifest.step,
        "stage": checkpoint.manifest.stage,
        "cuts": sequences * cuts,
        "rows": rows,
        "environment": environment(device, config.activation_dtype),
    }


@torch.no_grad()
def _measure(model: Llama, case: Case, sequences: int, cuts: int, device: torch.device) -> Record:
    """Losses by distance from the cut, with the text that follows it and with other text."""
    config = case.config
    attention = attention_of(config, case.attended, ContextParallel(block_backend=config.parallel.block_backend))
    dataset = TokenDataset(config.data.path, "held_out")
    tokens, labels = read_sequences(dataset, range(sequences), config.seq_len, [(0, config.seq_len)])
    behind = np.arange(WINDOWS * config.attention.pooling_factor ** (config.attention.num_levels - 1))
    generator = np.random.default_rng(0)
    with_future, changed = [], []
    for row in range(sequences):
        places = generator.integers(len(behind), config.seq_len - 1, size=(cuts, 1))  # of the last token that stays
        with_future += _losses(model, tokens[row : row + 1], labels[row], (places - behind)[None], attention, device)
        for some in np.split(places, range(AT_ONCE, cuts, AT_ONCE)):
            later = np.arange(config.seq_len) > some
            other = np.where(later, tokens[(row + 1) % sequences], tokens[row])
            changed += _losses(model, other, labels[row], (some - behind)[:, None], attention, device)
    a, b = (np.asarray(losses, np.float64) for losses in (with_future, changed))
    return {
        "mode": case.mode,
        "with_future": a.mean(0).tolist(),
        "changed_future": b.mean(0).tolist(),
        "standard_error": ((b - a).std(0, ddof=1) / math.sqrt(len(a))).tolist(),
    }


def _losses(
    model: Llama,
    tokens: NDArray[np.int64],
    labels: NDArray[np.int64],
    places: NDArray[np.int64],
    attention: Sequence[AttentionFunction],
    device: torch.device,
) -> list[list[float]]:
    """Of the tokens [B, N] at places [B, cuts, behind], each of which predicts its label [N]: one list a cut."""
    tokens_BN, places_BCD, labels_N = (torch.from_numpy(x).to(device) for x in (tokens, places, labels))
    hidden_BNE = model.hidden(tokens_BN, torch.arange(tokens.shape[1], device=device), attention)
    rows_B11 = torch.arange(len(tokens), device=device)[:, None, None]
    logits = model.output(hidden_BNE[rows_B11, places_BCD])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(logits.flatten(0, 2), labels_N[places_BCD].flatten(), reduction="none")
    found: list[list[float]] = losses.view(-1, places.shape[-1]).tolist()
    return found


def show(result: Record) -> str:
    """The report."""
    header = [
        "behind",
        *(
            f"{row['mode']}, {what}"
            for row in result["rows"]
            for what in ("as trained", "changed future", "difference")
        ),
    ]
    rows = []
    distances = [d for d in range(len(result["rows"][0]["changed_future"])) if d < 4 or not d & (d - 1)]
    for d in distances:
        cells = [str(d)]
        for row in result["rows"]:
            a, b, error = (row[key][d] for key in ("with_future", "changed_future", "standard_error"))
            cells += [f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f} ± {error:.4f}"]
        rows.append(cells)
    return document("What a selection tells of the future", table(header, rows), NOTES, {})


if __name__ == "__main__":
    sys.exit(main())
