"""Evaluation of a checkpoint: what it finds, at every layout, and by the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from forked_runs import run_to_end
from lhcp import config_file
from lhcp.checkpoint.manifest import Checkpoint
from lhcp.checkpoint.resume import find_checkpoint
from lhcp.config import ConfigError, RunConfig
from lhcp.distributed import ContextParallel
from lhcp.eval.__main__ import evaluate
from lhcp.eval.passkey import passkeys_found
from lhcp.eval.prompts import DIGIT_TOKENS, QUESTION, passkey_prompts
from lhcp.eval.report import write
from lhcp.eval.request import EvalRequest, prepare
from lhcp.metrics import read_events
from lhcp.model.llama import Llama
from lhcp.modes import attention_of
from ranks import run_ranks
from runs import make_config, write_data
from saved import read_all
from saved_models import PLAIN, random_model, save_model, tensors_of

SHORT, LONG = 130, 400
"""Tokens: too few for the selection, and more than the run's."""
STEPS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in float64."""
    folder = tmp_path_factory.mktemp("eval")
    stages = [{"mode": "lighthouse", "steps": 2}, {"mode": "dense", "steps": STEPS - 2}]
    evaluation = {"sequences": 2, "modes": ["dense", "lighthouse", "no_attention"]}
    config = make_config(write_data(folder), 1, 1, stages=stages, eval=evaluation)
    config_file.save(config, folder / "run.yaml")
    assert run_to_end(1, [str(folder / "run.yaml")], folder / "out") == [0]
    return config.output_dir


def request(run: Path, **values: Any) -> EvalRequest:
    return EvalRequest.model_validate({"checkpoint": find_checkpoint(run, None).folder} | values)


def evaluated(request: EvalRequest, rank: int) -> dict[str, Any]:
    return evaluate(request, prepare(request), torch.device("cpu"))


LAYOUTS = ((1, 1), (1, 2), (2, 2))


def test_held_out_loss_is_that_of_the_run_at_every_layout(run: Path) -> None:
    modes = ("dense", "lighthouse", "no_attention")
    expected = {event["event"]: event["loss"] for event in read_events(run) if event["event"].startswith("held_out")}
    for dp, cp in LAYOUTS:
        wanted = request(run, task="loss", modes=modes, overrides=(f"parallel.dp={dp}", f"parallel.cp={cp}"))
        for result in run_ranks(dp * cp, partial(evaluated, wanted)):
            losses = {row["mode"]: row["loss"] for row in result["rows"]}
            assert losses["dense"] == pytest.approx(expected["held_out"], rel=1e-12)
            assert losses["lighthouse"] == pytest.approx(expected["held_out_lighthouse"], rel=1e-12)
            assert losses["no_attention"] == pytest.approx(expected["held_out_no_attention"], rel=1e-12)
            assert len(set(losses.values())) == 3
            assert [(row["length"], row["samples"], row["attended"]) for row in result["rows"]] == [
                (360, 2, mode) for mode in modes
            ]
            assert (result["step"], result["stage"]) == (STEPS, "dense")


@pytest.fixture(scope="module")
def noisy(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Of the same shape, with random weights so large that its answers vary from prompt to prompt."""
    shape = config_file.load(run / "config.yaml").model
    tensors = tensors_of(random_model(shape).double())
    return save_model(shape, tmp_path_factory.mktemp("noisy") / "model", tensors)


def answers(noisy: Checkpoint, config: RunConfig, mode: Any, depth: float, samples: int) -> int:
    """Right answers of one process that computes every prompt alone, and whole logits."""
    model = Llama(config.model).double()
    model.load_state_dict({name.removeprefix("model."): x for name, x in read_all(noisy).items()})
    prompts, digits = passkey_prompts(config.seq_len, depth, samples, seed=0)
    attention = attention_of(config, mode, ContextParallel())
    right = 0
    for prompt, digit in zip(prompts, digits, strict=True):
        tokens = torch.zeros(1, config.padded_len, dtype=torch.int64)
        tokens[0, : config.seq_len] = torch.from_numpy(prompt)
        with torch.no_grad():
            logits = model.output(model.hidden(tokens, torch.arange(config.padded_len), attention))
        right += int(logits[0, config.seq_len - 1, list(DIGIT_TOKENS)].argmax()) == digit
    return right


def test_passkeys_are_counted_the_same_at_every_layout(run: Path, noisy: Checkpoint) -> None:
    """Batches of several prompts, padding, and prompts that are too short for the selection."""
    values = {"task": "passkey", "modes": ("dense", "lighthouse"), "lengths": (SHORT, LONG), "samples": 10,
              "depths": (15, 85), "checkpoint": noisy.folder, "config": run / "config.yaml"}  # fmt: skip
    cases = prepare(request(run, **values)).cases
    assert [(case.mode, case.attended, case.config.seq_len) for case in cases] == [
        ("dense", "dense", SHORT), ("lighthouse", "dense", SHORT), ("dense", "dense", LONG),
        ("lighthouse", "lighthouse", LONG),
    ]  # fmt: skip
    assert cases[-1].config.padded_len > LONG
    assert {case.config.attention.num_strata for case in cases} == {8}
    expected = [answers(noisy, case.config, case.attended, depth, 10) for case in cases for depth in (15, 85)]
    assert len(set(expected)) > 2, expected  # else anything would pass
    for dp, cp in LAYOUTS:
        wanted = request(run, **values, overrides=(f"parallel.dp={dp}", f"parallel.cp={cp}"))
        for result in run_ranks(dp * cp, partial(evaluated, wanted)):
            assert [row["found"] for row in result["rows"]] == expected


class Reader:
    """In place of a model: it looks the digit up in its prompt, and tells another token to be likelier still."""

    output = SimpleNamespace(weight=torch.zeros(1))

    def logits(self, tokens: Tensor, positions: Tensor, attention: Any, index: int) -> Tensor:
        assert index == 199
        logits = torch.zeros(len(tokens), 257)
        for row, prompt in enumerate(tokens.tolist()):
            text = bytes(prompt[:200]).decode()
            logits[row, ord(text[text.index(QUESTION) + len(QUESTION)])] = 1
            logits[row, ord("x")] = 2
        return logits


@pytest.mark.parametrize("depth", [0, 50, 100])
def test_a_model_that_reads_finds_all(run: Path, depth: float) -> None:
    config = config_file.load(run / "config.yaml", ["seq_len=200", "stages=[{mode: dense, steps: 1}]"]).resolve(1)

    def found(rank: int) -> int:
        mesh: Any = SimpleNamespace(context_parallel=ContextParallel(), dp_rank=0, dp_size=1)
        model: Any = Reader()
        return passkeys_found(model, config, [], mesh, depth=depth, samples=23, seed=0, at_once=1_000)

    assert run_ranks(1, found) == [23]


def test_what_is_wrong_is_said_before_anything_starts(run: Path, tmp_path: Path) -> None:
    def refused(**values: Any) -> str:
        with pytest.raises(ConfigError) as refusal:
            prepare(request(run, **values))
        return str(refusal.value)

    assert "samples do not divide evenly over parallel.dp 2; nearest: 2 or 4" in refused(
        task="passkey", samples=3, overrides=("parallel.dp=2",)
    )
    assert refused(task="passkey", lengths=(20,)) == "context 20: a passkey prompt has at least 69 tokens"
    assert "too few for 1000 sequence(s) of seq_len 360" in refused(task="loss", samples=1000)
    assert refused(task="loss", overrides=("model.dim=32",)) == (
        "model.dim: given 32, but the checkpoint's is 24; leave it out"
    )
    assert "num_strata 8 is not legal" in refused(task="loss", modes=("lighthouse",), overrides=("parallel.cp=3",))
    imported = save_model(PLAIN, tmp_path / "imported", tensors_of(random_model(PLAIN)), data=None)
    with pytest.raises(ConfigError, match="give a run's file by --config"):
        prepare(EvalRequest(task="loss", checkpoint=imported.folder))
    values = {"checkpoint": imported.folder, "config": run / "config.yaml"}
    with pytest.raises(ConfigError, match="of an unknown tokenizer; passkeys are asked for in bytes"):
        prepare(EvalRequest.model_validate({"task": "passkey"} | values))
    assert prepare(EvalRequest.model_validate({"task": "loss"} | values)).cases[0].config.model == PLAIN


def test_contexts_are_doubles_up_to_the_run_s_own(run: Path) -> None:
    def lengths(seq_len: int) -> list[int]:
        changed = ("stages=[{mode: dense, steps: 1}]", f"seq_len={seq_len}")
        return [case.config.seq_len for case in prepare(request(run, task="passkey", overrides=changed)).cases]

    assert lengths(360) == [360]
    assert lengths(16_384) == [4_096, 8_192, 16_384]
    assert lengths(98_304) == [4_096, 8_192, 16_384, 32_768, 65_536, 98_304]


def test_damage_is_named(run: Path, tmp_path: Path) -> None:
    good = find_checkpoint(run, None)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in good.folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    name = next(name for name in good.manifest.files if name.endswith(".safetensors"))
    (copy / name).write_bytes((copy / name).read_bytes()[:-1])
    wanted = request(run, task="loss")
    prepared = replace(prepare(wanted), checkpoint=Checkpoint.open(copy))

    def refusal(rank: int) -> str:
        with pytest.raises(ConfigError) as found:
            evaluate(wanted, prepared, torch.device("cpu"))
        return str(found.value)

    assert all(name in message for message in run_ranks(2, refusal))


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    line = [sys.executable, "-c", "from lhcp.cli import main; main()", "eval", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=240, env=environment)


def test_the_commands(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    done = command("loss", run, "--mode", "lighthouse", "--set", "parallel.cp=2", "--out", out)
    assert done.returncode == 0, done.stderr
    (loss,) = (event["loss"] for event in read_events(run) if event["event"] == "held_out_lighthouse")
    assert f"{loss:.4f}" in done.stdout
    written = json.loads((out / "loss.json").read_text())
    assert written["rows"][0]["loss"] == pytest.approx(loss)
    assert written["environment"]["cp"] == 2
    done = command("passkey", run, "--contexts", "80,360", "--samples", "10", "--depths", "0,100", "--out", out)
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "passkey.json").read_text())["rows"]
    assert [(row["length"], row["depth"]) for row in rows] == [(80, 0), (80, 100), (360, 0), (360, 100)]
    line = next(line for line in done.stdout.splitlines() if " 100% " in line)
    assert [cell.strip() for cell in line.strip("│").split("│")][2:] == [
        f"{row['found'] / 10:.0%}" for row in rows[1::2]
    ]
    assert (out / "passkey.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_words_are_one_message(run: Path, tmp_path: Path) -> None:
    for words, message in (
        (("passkey", run, "--contexts", "4k"), "error: --contexts '4k': must be numbers with commas between them"),
        (("loss", run, "--mode", "sparse"), "error: modes.0: given 'sparse', must be"),
        (("loss", tmp_path), f"error: no checkpoint in {tmp_path}"),
        (("loss", run, "--step", "2"), f"error: {run} has no checkpoint after 2 steps; valid: 3"),
    ):
        done = command(*words)
        assert done.returncode == 2
        assert done.stderr.startswith(message), done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_a_report_of_both_modes_has_two_panels(tmp_path: Path) -> None:
    rows = [{"mode": mode, "attended": mode, "length": length, "samples": 4, "depth": depth, "found": 1}
            for mode in ("dense", "lighthouse") for length in (100, 2048) for depth in (0.0, 50.0)]  # fmt: skip
    result = {"task": "passkey", "rows": rows}
    assert [path.name for path in write(result, tmp_path)] == ["passkey.json", "passkey.png"]
    assert json.loads((tmp_path / "passkey.json").read_text()) == result
