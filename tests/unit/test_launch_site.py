"""The site file: where it is looked for, and what is wrong in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lhcp.config import ConfigError
from lhcp.launch.site import Site, load_site

KEYS = (
    "account, partition, qos, reservation, constraint, exclude, gpus, sbatch, setup, python, container, "
    "network_interface, env"
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, which is also the current directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LHCP_SITE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_default(home: Path) -> None:
    (home / ".config" / "lhcp").mkdir(parents=True)
    (home / ".config" / "lhcp" / "cluster.yaml").write_text("account: of home\n")


def test_where_it_is_looked_for(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_site() == Site()
    write_default(home)
    assert load_site() == Site(account="of home")
    (home / "variable.yaml").write_text("account: of the variable\n")
    monkeypatch.setenv("LHCP_SITE", "variable.yaml")
    assert load_site() == Site(account="of the variable")
    (home / "named.yaml").write_text("account: of the option\n")
    assert load_site(Path("named.yaml")) == Site(account="of the option")
    monkeypatch.setenv("LHCP_SITE", "")
    assert load_site() == Site(account="of home")


def test_a_file_that_was_named_must_exist(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_default(home)
    with pytest.raises(ConfigError) as error:
        load_site(Path("no.yaml"))
    assert str(error.value) == "no.yaml: no such file"
    monkeypatch.setenv("LHCP_SITE", "gone.yaml")
    with pytest.raises(ConfigError) as error:
        load_site()
    assert str(error.value) == "gone.yaml: no such file"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acount: x", f"s.yaml: acount: unknown key; did you mean 'account'? valid: {KEYS}"),
        ("zzz: x", f"s.yaml: zzz: unknown key; valid: {KEYS}"),
        ("a: [1", "s.yaml, line 1: expected ',' or ']', but got '<stream end>'"),
        ("account: a\naccount: b", "s.yaml, line 2: 'account' is given twice"),
        ("- account", "s.yaml: given ['account'] at the top level, must be a mapping (key: value)"),
        (
            "gpus: --gres=gpu:8",
            "s.yaml: gpus: given '--gres=gpu:8', must be one option of sbatch with {n} in it, such as --gres=gpu:{n}",
        ),
        (
            "gpus: 'gpu:{n}'",
            "s.yaml: gpus: given 'gpu:{n}', must be one option of sbatch with {n} in it, such as --gres=gpu:{n}",
        ),
        (
            "gpus: '--gres=gpu:{n} --exclusive'",
            "s.yaml: gpus: given '--gres=gpu:{n} --exclusive', must be one option of sbatch with {n} in it, such as "
            "--gres=gpu:{n}",
        ),
        ("env: {1A: x}", "s.yaml: env: given '1A', must be the name of an environment variable"),
        ("env: {A B: x}", "s.yaml: env: given 'A B', must be the name of an environment variable"),
        ("env: {'A=B': x}", "s.yaml: env: given 'A=B', must be the name of an environment variable"),
        ("sbatch: {output: x}", "s.yaml: sbatch: output cannot be set: the launcher does"),
        ("sbatch: {chdir: x}", "s.yaml: sbatch: chdir cannot be set: the launcher does"),
        (
            "sbatch: {--mem: 1G}",
            "s.yaml: sbatch: given '--mem', must be the long name of an option of sbatch, such as cpus-per-task",
        ),
        ("setup: module load", "s.yaml: setup: given 'module load', must be a list"),
        ("container: {image: x}", "s.yaml: container.runtime: required"),
        (
            "container: {runtime: docker, image: x}",
            "s.yaml: container.runtime: given 'docker', must be 'pyxis' or 'apptainer'",
        ),
        (
            "container: torch",
            "s.yaml: container: given 'torch', must be a section with the keys runtime, image, mounts",
        ),
        (
            "container: {runtime: pyxis, image: x, mount: []}",
            "s.yaml: container.mount: unknown key; did you mean 'mounts'? valid in container: runtime, image, mounts",
        ),
        (
            "account: ''\nqos: ''",
            "s.yaml: account: given '', must be one line of text\nqos: given '', must be one line of text",
        ),
    ],
)
def test_wrong_values(home: Path, text: str, message: str) -> None:
    (home / "s.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_site(Path("s.yaml"))
    assert str(error.value) == message


def test_all_keys(home: Path) -> None:
    text = """\
gpus: --gres=gpu:b200:{n}
sbatch: {nice: null, comment: x}
setup: [module load cuda]
container: {runtime: apptainer, image: torch.sif}
"""
    (home / "s.yaml").write_text(text)
    site = load_site(Path("s.yaml"))
    assert site.gpu_option(4) == ("gres", "gpu:b200:4")
    assert site.options() == {"nice": None, "comment": "x"}
    assert site.setup == ["module load cuda"]
    assert site.command([Path("/a")]) == (
        [],
        ["apptainer", "exec", "--nv", "--bind", "/a:/a", "torch.sif", "python3"],
    )


def test_numbers_are_values_as_any_other(home: Path) -> None:
    """YAML reads 16 as a number, where sbatch and the environment have text alone."""
    (home / "s.yaml").write_text(
        "account: 17\nsbatch: {cpus-per-task: 16, time: 12:00:00, begin: 16:00, nice: 1:30.5}\n"
        "env: {NCCL_IB_TIMEOUT: 22}\n"
    )
    options = {"cpus-per-task": "16", "time": "12:00:00", "begin": "16:00", "nice": "1:30.5"}
    expected = Site(account="17", sbatch=options, env={"NCCL_IB_TIMEOUT": "22"})
    assert load_site(Path("s.yaml")) == expected
