"""The `lhcp` command as a user meets it: real processes, exit codes, what is printed and what is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lhcp
from lhcp import cli
from lhcp.data import prepare
from lhcp.launch import torchrun

README = Path(__file__).resolve().parents[2] / "README.md"
EXAMPLE = Path(__file__).resolve().parents[2] / "launch" / "configs" / "demo.yaml"
# The entry point, where any import of torch fails.
WITHOUT_TORCH = """\
import sys
sys.modules["torch"] = None
from lhcp.cli import main
main()
"""


def lhcp_command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lr=-1"], "optim.lr: given -1, must be greater than 0"),
        (["dtype=half", "seed=-1"], "seed: given -1, must be at least 0\n       dtype: given 'half', must be "),
        (["attention.num_strata=2"], "num_strata 2 is not legal: it does not divide evenly over the 4 chunks of the "),
        (["parallel.dp=3"], "global_batch_size 1 is not a multiple of dp 3 x micro_batch_size 1; nearest legal: 3"),
        (["optim.lr"], "override 'optim.lr': must be KEY=VALUE, such as optim.lr=0.001"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_train_refuses_a_wrong_configuration(tmp_path: Path, overrides: list[str], message: str) -> None:
    sets = [word for override in overrides for word in ("--set", override)]
    done = lhcp_command("train", EXAMPLE, *sets, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {message}")
    assert len(done.stderr.splitlines()) == len(message.splitlines())
    assert list(tmp_path.iterdir()) == []


def test_train_refuses_a_missing_file(tmp_path: Path) -> None:
    done = lhcp_command("train", "no.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: no.yaml: no such file\n")
    assert list(tmp_path.iterdir()) == []


def test_train_refuses_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seq_len: [1\nseed: 2\n")
    done = lhcp_command("train", "run.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: run.yaml, line 2: expected ',' or ']', but got ':'\n"


@pytest.mark.parametrize("arguments", [["train"], ["fly"], ["train", "x.yaml", "--fast"], ["data", "prepare", "x"], []])
def test_wrong_usage(tmp_path: Path, arguments: list[str]) -> None:
    done = lhcp_command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Usage: " in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_version(tmp_path: Path) -> None:
    help_ = lhcp_command("--help", cwd=tmp_path)
    assert help_.returncode == 0
    for command in ("train", "status", "data", "export", "import", "demo"):
        assert command in help_.stdout
    version = lhcp_command("--version", cwd=tmp_path)
    assert (version.returncode, version.stdout) == (0, f"lhcp {lhcp.__version__}\n")


def test_the_error_that_the_readme_shows(tmp_path: Path) -> None:
    result = lhcp_command("train", EXAMPLE, "--set", "parallel.cp=8", cwd=tmp_path)
    assert f"$ lhcp train launch/configs/demo.yaml --set parallel.cp=8\n{result.stderr}```" in README.read_text()


def test_data_prepare(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"document {number:04}")
    (texts / "again.txt").write_text("document 0000")
    done = lhcp_command("data", "prepare", "texts", "--out", "tokens", "--held-out", "0.3", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("tokens: ")
    assert lines[1] == "  read      41 files, 41 documents (dropped 1 duplicate, 0 empty)"
    kept = {line[2:10].strip(): line.split() for line in lines[2:]}
    documents = {name: int(words[-2]) for name, words in kept.items()}
    assert documents.keys() == {"train", "held out"}
    assert sum(documents.values()) == 40
    tokens = {name: int(words[-4].replace(",", "")) for name, words in kept.items()}
    assert tokens == {name: 14 * count for name, count in documents.items()}  # 13 bytes and the end

    again = lhcp_command("data", "prepare", "texts", "--out", "tokens", "--held-out", "0.3", cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")
    assert len(again.stderr.splitlines()) == 1
    arguments = ("data", "prepare", "texts", "--out", "tokens", "--held-out", "0", "--overwrite")
    assert lhcp_command(*arguments, cwd=tmp_path).returncode == 0

    (tmp_path / "texts" / "more.jl").write_text("function")
    (tmp_path / "texts" / "more.jsonl").write_text('{"body": "a record"}\n')
    more = lhcp_command(*arguments, "--suffix", ".jl", "--text-key", "body", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    assert "read      43 files, 43 documents" in more.stdout


def test_data_verify(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 1234)
    prepare([tmp_path / "a.txt"], tmp_path / "tokens", held_out=0, shard_tokens=1000)
    whole = lhcp_command("data", "verify", "tokens", cwd=tmp_path)
    assert (whole.returncode, whole.stderr) == (0, "")
    assert whole.stdout == "tokens is whole: 2 shard(s), 1,235 tokens\n"
    (tmp_path / "tokens" / "train-00001.bin").write_bytes(b"a\0" * 235)
    damaged = lhcp_command("data", "verify", "tokens", cwd=tmp_path)
    assert (damaged.returncode, damaged.stdout) == (2, "")
    assert damaged.stderr.startswith("error: tokens/train-00001.bin is damaged: its sha256 is not that of what was ")
    assert len(damaged.stderr.splitlines()) == 1


@pytest.mark.parametrize(("cp", "dp", "nproc"), [(2, "1", 2), (1, "", 1), (2, "", 2), (2, "2", 4)])
def test_train_starts_one_process_per_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cp: int, dp: str, nproc: int
) -> None:
    calls: list[tuple[Path, list[str], int, list[str]]] = []

    def record(config: Path, overrides: list[str], nproc: int, flags: list[str]) -> int:
        calls.append((config, list(overrides), nproc, flags))
        return 7

    monkeypatch.setattr(torchrun, "run", record)
    texts = [tmp_path / f"{number}.txt" for number in range(8)]
    for number, text in enumerate(texts):
        text.write_text(f"{number} " * 10_000)
    prepare(texts, tmp_path / "tokens", held_out=0.5)
    places = [f"data.path={tmp_path / 'tokens'}", f"output_dir={tmp_path / 'run'}", "eval.sequences=2"]
    overrides = [f"parallel.cp={cp}", f"parallel.dp={dp}", "global_batch_size=2", *places]
    arguments = ["train", str(EXAMPLE), *(word for override in overrides for word in ("--set", override))]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 7, result.output
    assert calls == [(EXAMPLE, overrides, nproc, [])]

    resuming = ["--resume", "last", "--allow-change", "model", "--allow-change", "data"]
    CliRunner().invoke(cli.app, [*arguments, *resuming])
    assert calls[1:] == [(EXAMPLE, overrides, nproc, resuming)]

    CliRunner().invoke(cli.app, [*arguments, "--profile.steps", "10:13"])
    assert calls[2:] == [(EXAMPLE, [*overrides, "profile.steps=10:13"], nproc, [])]
    refused = CliRunner().invoke(cli.app, [*arguments, "--profile.steps", "10:13", "--profile.memory"])
    assert str(refused.exception).startswith("profile.memory records the memory of a GPU, and the run is on CPUs")
    assert calls[3:] == []


def test_a_grid_is_not_planned_as_one_run() -> None:
    done = lhcp_command("plan", "launch/configs/sweep.yaml", "--gpus", "8", "--gpu", "h100", cwd=README.parent)
    assert done.returncode == 2
    assert "launch/configs/sweep.yaml is a grid of 16 runs; plan launch/configs/98k.yaml, with --set" in done.stderr
