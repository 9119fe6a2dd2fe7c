"""Submitting from a machine that has no torch: a Python environment that is really without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import lhcp
from golden.update import GOLDEN, SITE, rendered
from lhcp import config_file
from lhcp.launch import grid, script
from lhcp.launch.prepare import NO_TORCH

REPOSITORY = Path(__file__).resolve().parents[2]
WITH_TORCH = re.compile(r"(torch|triton|functorch|torchgen|nvidia|cuda|__editable__|lhcp)", re.IGNORECASE)
MAIN = "from lhcp.cli import main; main()"
RUNS = {"latency": "98k", "train_98k": "98k", "train_1m": "1m"}
GRIDS = {"recoverability": "recoverability", "sweep": "sweep"}


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that is installed but torch and what belongs to it; and lhcp, from this checkout."""
    folder = tmp_path_factory.mktemp("site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not WITH_TORCH.match(entry.name):
            (folder / entry.name).symlink_to(entry)
    (folder / "lhcp").symlink_to(Path(lhcp.__file__).parent)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, run.yaml, grid.yaml, and a site file."""
    folder = tmp_path_factory.mktemp("inputs")
    rendered(folder)
    (folder / "site.yaml").write_text(SITE)
    return folder


def python(site_packages: Path, *arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "LHCP_SITE"}
    environment |= {"PYTHONPATH": str(site_packages), "COLUMNS": "120", "NO_COLOR": "1", "HOME": str(cwd)}
    command = [sys.executable, "-S", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=180)


def lhcp_command(site_packages: Path, *arguments: str | Path, cwd: Path) -> str:
    """What a command prints that succeeds; where no site names the Python that trains, it says so, too."""
    done = python(site_packages, "-c", MAIN, *arguments, cwd=cwd)
    unnamed = "--dry-run" in arguments and "--site" not in arguments
    assert (done.returncode, done.stderr) == (0, f"note: this could not be submitted here: {NO_TORCH}\n" * unnamed)
    return done.stdout


def test_torch_is_not_there(site_packages: Path, tmp_path: Path) -> None:
    done = python(site_packages, "-c", "import pydantic, typer, yaml; import torch", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'torch'\n")
    found = python(site_packages, "-c", "import lhcp.launch.submit as s; print(s.__file__)", cwd=tmp_path)
    assert found.stdout == f"{site_packages}/lhcp/launch/submit.py\n"


def test_submit(site_packages: Path, inputs: Path, tmp_path: Path) -> None:
    before = sorted(inputs.rglob("*"))
    text = lhcp_command(site_packages, "submit", "--help", cwd=tmp_path)
    assert "Usage: " in text
    assert "--dry-run" in text
    for command in (["submit", inputs / "run.yaml"], ["launch", "sbatch", "train_98k", inputs / "run.yaml"]):
        out = inputs / "runs" / "train_98k"
        job = [*command, "--site", inputs / "site.yaml", "--out", out, "--dry-run"]
        text = lhcp_command(site_packages, *job, cwd=tmp_path)
        golden = (GOLDEN / "train_98k.sbatch").read_text()
        assert text.replace(str(inputs / "runs"), "/RUNS") == golden
    assert sorted(inputs.rglob("*")) == before


def test_sbatch_with_options(site_packages: Path, inputs: Path, tmp_path: Path) -> None:
    options = ["--nodes", "2", "--gpus-per-node", "4", "--time", "1:00:00", "--sbatch", "nice=5", "--sbatch", "--wait"]
    command = ["launch", "sbatch", "train_98k", inputs / "run.yaml", "--set", "parallel.cp=8", "--dry-run"]
    lines = lhcp_command(site_packages, *command, *options, "--out", "run", cwd=tmp_path).splitlines()
    found = [line.split("  #")[0].rstrip() for line in lines if line.startswith("#SBATCH")]
    assert found == [
        "#SBATCH --job-name=run", "#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=1", "#SBATCH --gpus-per-node=4",
        "#SBATCH --exclusive", "#SBATCH --mem=0", "#SBATCH --time=1:00:00", "#SBATCH --signal=USR1@660",
        "#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --nice=5", "#SBATCH --wait",
        f"#SBATCH --output={tmp_path}/run/jobs/001/slurm-%j.out", f"#SBATCH --chdir={tmp_path}/run/jobs/001",
    ]  # fmt: skip


def test_what_needs_torch_says_so(site_packages: Path, inputs: Path, tmp_path: Path) -> None:
    commands = [["train", inputs / "run.yaml", "--set", "output_dir=run"], ["import", inputs, "--to", "run"]]
    if shutil.which("sbatch"):  # it asks for Slurm first
        commands.append(["submit", inputs / "run.yaml", "--out", "run"])
    for command in commands:
        done = python(site_packages, "-c", MAIN, *command, cwd=tmp_path)
        assert done.returncode == 2
        assert re.fullmatch(r"error: (jobs would run the|this needs PyTorch, which) .*\n", done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


def test_refusals(site_packages: Path, inputs: Path, tmp_path: Path) -> None:
    commands = {
        ("submit", "no.yaml"): "no.yaml: no such file",
        ("submit", inputs / "run.yaml", "--site", "no.yaml"): "no.yaml: no such file",
        ("submit", inputs / "run.yaml", "--sbatch", "output=x"): "--sbatch: output cannot be set: the launcher does",
        ("submit", tmp_path): f"{tmp_path}: nothing was submitted from there; submit a configuration: lhcp submit "
        "CONFIG",
        ("logs", "."): f"{tmp_path}: nothing was submitted from there; submit a configuration: lhcp submit CONFIG",
        ("cancel", "."): f"{tmp_path}: no job is waiting or running; `squeue --me` lists all of yours",
        ("launch", "torchrun", inputs / "run.yaml", "--nodes", "1", "--gpus-per-node", "1", "--head", "host"): (
            "--head: given 'host', must be HOST:PORT with a port from 1 to 65535"
        ),
    }
    for command, message in commands.items():
        done = python(site_packages, "-c", MAIN, *command, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_templates(site_packages: Path, tmp_path: Path) -> None:
    text = lhcp_command(site_packages, "launch", "templates", cwd=tmp_path)
    assert text == "".join(f"{name:16}{script.read(name).summary}\n" for name in script.names())


def test_torchrun(site_packages: Path, inputs: Path, tmp_path: Path) -> None:
    command = ["launch", "torchrun", inputs / "run.yaml", "--nodes", "2", "--gpus-per-node", "8", "--head", "n1:29400"]
    text = lhcp_command(site_packages, *command, cwd=tmp_path)
    assert text.endswith(f" -m lhcp.train {inputs}/run.yaml\n")


def test_status(site_packages: Path, inputs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = config_file.load(inputs / "run.yaml", [f"output_dir={run}"]).resolve(2)
    config_file.save(config, run / "config.yaml")
    text = lhcp_command(site_packages, "status", "run", cwd=tmp_path)
    assert "waiting to start" in text
    assert "0 of 5" in text


@pytest.mark.parametrize(("template", "name"), RUNS.items())
def test_configurations_fit_their_templates(template: str, name: str) -> None:
    path = Path("launch") / "configs" / f"{name}.yaml"
    assert f"lhcp launch sbatch {template} {path}" in (REPOSITORY / "slurm" / f"{template}.sbatch").read_text()
    config = config_file.load(REPOSITORY / path).resolve(processes(template))
    assert config.parallel.dp == processes(template) // config.parallel.cp
    assert config.checkpoint.stop_timeout_s < 660


@pytest.mark.parametrize(("template", "name"), GRIDS.items())
def test_grids_fit_their_templates(template: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("launch") / "configs" / f"{name}.yaml"
    assert f"lhcp launch sbatch {template} {path}" in (REPOSITORY / "slurm" / f"{template}.sbatch").read_text()
    monkeypatch.chdir(REPOSITORY)
    base, elements = grid.load(path)
    assert len(elements) == {"recoverability": 4, "sweep": 16}[name]
    resolved = [config_file.load(base, element.overrides).resolve(processes(template)) for element in elements]
    if name == "recoverability":
        assert {config.total_steps for config in resolved} == {16_000}
    else:
        found = {(config.seq_len, config.parallel.cp) for config in resolved}
        assert found == {(n, cp) for n in (98_304, 262_144, 524_288, 1_048_576) for cp in (1, 2, 4, 8)}


def test_all_configurations_are_checked_here() -> None:
    names = {path.stem for path in (REPOSITORY / "launch" / "configs").glob("*.yaml")}
    assert names == {*RUNS.values(), *GRIDS.values(), "demo", "paper-rows"}  # the last: test_recoverability
    config_file.load(REPOSITORY / "launch" / "configs" / "demo.yaml").resolve(2)


def processes(template: str) -> int:
    options = script.read(template).options
    return int(options["nodes"] or "") * int(options["gpus-per-node"] or "")
