"""What a selection tells of the future, measured on runs whose selection leaves something out, and nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import lookahead
from forked_runs import run_to_end
from lhcp import config_file
from lhcp.attention import LighthouseConfig
from lhcp.checkpoint.resume import find_checkpoint
from lhcp.checkpoint.state import load
from lhcp.config import ConfigError
from lhcp.data import TokenDataset
from lhcp.data.loader import read_sequences
from lhcp.distributed import ContextParallel
from lhcp.model.llama import Llama
from lhcp.modes import attention_of
from runs import make_config, write_data

SEQ_LEN, SEQUENCES, CUTS = 128, 3, 5


def trained(folder: Path, topk: int, seq_len: int = SEQ_LEN) -> Path:
    """A run of one step in float64, with pairs of tokens of which it selects `topk`."""
    attention = LighthouseConfig(num_levels=2, pooling_factor=2, topk=topk, num_strata=2)
    stages = [{"mode": "lighthouse", "steps": 1}]
    config = make_config(write_data(folder), 1, 1, seq_len=seq_len, attention=attention, stages=stages)
    config_file.save(config, folder / "run.yaml")
    assert run_to_end(1, [str(folder / "run.yaml")], folder / "out") == [0]
    return config.output_dir


def test_losses_at_the_cuts(tmp_path: Path) -> None:
    run = trained(tmp_path, topk=8)
    assert lookahead.main([str(run), "--sequences", str(SEQUENCES), "--cuts", str(CUTS), "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "lookahead.json").read_text())["rows"]
    checkpoint = find_checkpoint(run, None)
    config = config_file.load(run / "config.yaml")
    model = Llama(config.model).double()
    load(checkpoint, model, None)
    tokens, labels = read_sequences(
        TokenDataset(config.data.path, "held_out"), range(SEQUENCES), SEQ_LEN, [(0, SEQ_LEN)]
    )
    for row in rows:
        attention = attention_of(config, row["mode"], ContextParallel())
        generator, behind = np.random.default_rng(0), len(row["changed_future"])
        losses = np.zeros((2, SEQUENCES * CUTS, behind))
        for number in range(SEQUENCES * CUTS):
            sequence = number // CUTS
            if number % CUTS == 0:
                cuts = generator.integers(behind, SEQ_LEN - 1, size=CUTS)
            cut = int(cuts[number % CUTS])
            replaced = np.concatenate([tokens[sequence, : cut + 1], tokens[(sequence + 1) % SEQUENCES, cut + 1 :]])
            for kind, given in enumerate((tokens[sequence], replaced)):
                with torch.no_grad():
                    hidden = model.hidden(torch.from_numpy(given)[None], torch.arange(SEQ_LEN), attention)[0]
                    each = F.cross_entropy(model.output(hidden), torch.from_numpy(labels[sequence]), reduction="none")
                losses[kind, number] = [each[cut - distance] for distance in range(behind)]
        assert row["with_future"] == pytest.approx(losses[0].mean(0).tolist(), rel=1e-6)
        assert row["changed_future"] == pytest.approx(losses[1].mean(0).tolist(), rel=1e-6)
        found = np.abs(losses[1] - losses[0]).max(0)
        if row["mode"] == "dense":
            assert found.max() < 1e-12
            assert max(row["standard_error"]) < 1e-12
        else:
            assert found[0] > 1e-6
            assert row["standard_error"][0] > 1e-7


def test_a_selection_that_leaves_nothing_out_tells_nothing(tmp_path: Path) -> None:
    result = lookahead.measure(find_checkpoint(trained(tmp_path, topk=SEQ_LEN // 2), None), SEQUENCES, CUTS)
    lighthouse, dense = result["rows"]
    assert lighthouse["changed_future"] == pytest.approx(lighthouse["with_future"], rel=1e-6)
    assert max(lighthouse["standard_error"]) < 1e-7
    assert lighthouse["changed_future"] != dense["changed_future"]


def test_padded_sequences_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path, topk=8, seq_len=SEQ_LEN - 3)
    with pytest.raises(ConfigError, match=f"seq_len {SEQ_LEN - 3}: .* without padding"):
        lookahead.measure(find_checkpoint(run, None), SEQUENCES, CUTS)
    assert lookahead.main([str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert lookahead.main([str(run), "--out", str(tmp_path / "run.yaml" / "results")]) == 2
    assert "choose another" in capsys.readouterr().err
    checkpoint = find_checkpoint(run, None)
    shard = checkpoint.folder / "rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert lookahead.main([str(run)]) == 2
    assert shard.name in capsys.readouterr().err
