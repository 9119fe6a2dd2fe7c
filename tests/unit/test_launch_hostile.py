"""Names that a shell or sbatch would take for more than text: they arrive exactly, or are refused."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from golden.sbatch_rule import sbatch_options
from golden.update import write_inputs
from job_records import job_record
from lhcp.config import ConfigError
from lhcp.config.validation import validate
from lhcp.launch import jobs
from lhcp.launch.prepare import Prepared, Request, prepare
from lhcp.launch.site import Container, Site

HOSTILE = [
    "with space", " around ", "it's", 'say "hi"', "'", "$(touch PWNED)", "`touch PWNED`", "a;touch PWNED",
    "a&touch PWNED&", "#hash", "a #b", "*", "?[a-z]", "ünï-✓-日本", "-dash", "--wrap=touch PWNED", "a~", "!!", "{a,b}",
    "$1", "<in>out|touch PWNED", "a\tb", "(x)", "'; touch PWNED; '", '"; touch PWNED; "', "a\x1bb", "=",
    "a\u2028b\x85c",
]  # fmt: skip
# What no folder for results may have in its name, but everything else may.
MORE_HOSTILE = [*HOSTILE, "%j", "host:/path", "a\\b", "\\", '\\"', "a\\$(touch PWNED)"]
PRINTER = """\
#!/usr/bin/env bash
# Prints what a job is given.
#LHCP needs=config trains=yes
#SBATCH --nodes=1
#SBATCH --gpus-per-node=2
#SBATCH --time=1:00:00
#SBATCH --signal=USR1@660

set -euo pipefail
printf '%s\\0' "$LHCP_GPUS" "${#LHCP_SRUN[@]}" "${LHCP_SRUN[@]}" "${#LHCP_PYTHON[@]}" "${LHCP_PYTHON[@]}"
env -0
"""


@dataclass
class Printed:
    """What a job's script has printed."""

    gpus: str
    srun: list[str]
    python: list[str]
    environment: dict[str, str]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    (folder / "printer.sbatch").write_text(PRINTER)
    return folder


def job(inputs: Path, out: Path, site: Site | None = None, data: Path | None = None, **options: str) -> Prepared:
    return prepare(
        Request(
            template=str(inputs / "printer.sbatch"),
            config=inputs / "run.yaml",
            out=out,
            overrides=[] if data is None else [f"data={{path: {json_string(data)}}}"],
            options={name.replace("_", "-"): value for name, value in options.items()},
            site=site or Site(),
        )
    )


def json_string(path: Path) -> str:
    """As YAML takes it: escapes for everything that is not printable."""
    return '"' + "".join(rf"\U{ord(character):08x}" for character in str(path)) + '"'


def run(prepared: Prepared, tmp_path: Path, **environment: str) -> Printed:
    """By real bash, in an empty folder that must stay empty."""
    script, home = tmp_path / "script", tmp_path / "home"
    home.mkdir()
    script.write_text(prepared.text, encoding="utf-8")
    variables = {"PATH": os.environ["PATH"], "HOME": str(home), **environment}
    done = subprocess.run(["bash", script], cwd=home, env=variables, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert list(home.iterdir()) == []
    assert list(tmp_path.rglob("PWNED")) == []
    words = done.stdout.decode().split("\0")
    gpus, words = words[0], words[1:]
    srun, words = words[1 : 1 + int(words[0])], words[1 + int(words[0]) :]
    python, words = words[1 : 1 + int(words[0])], words[1 + int(words[0]) :]
    return Printed(gpus, srun, python, dict(word.split("=", 1) for word in words if word))


@pytest.mark.parametrize("name", HOSTILE)
def test_folders(inputs: Path, tmp_path: Path, name: str) -> None:
    data, out = tmp_path / f"data {name}", tmp_path / "runs" / name
    data.symlink_to(inputs / "data")
    prepared = job(inputs, out, data=data)
    printed = run(prepared, tmp_path)
    folder = out / "jobs" / "001"
    assert printed.gpus == "2"
    assert (printed.srun, printed.python) == ([], [Site().interpreter()])
    names = ("LHCP_OUT", "LHCP_JOB", "PYTHONPATH")
    assert [printed.environment[name] for name in names] == [str(out), str(folder), f"{out}/code"]
    options = sbatch_options(prepared.text)
    assert options == prepared.options
    read = [options[name] for name in ("job-name", "output", "chdir")]
    assert read == [name, f"{folder}/slurm-%j.out", str(folder)]
    prepared.write()
    assert prepared.script.read_text(encoding="utf-8") == prepared.text
    record = job_record(folder, name=name)
    jobs.remember(out, [record])
    assert jobs.submitted(out) == [record]


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
@pytest.mark.parametrize("name", [name for name in HOSTILE if "," not in name])
def test_folders_in_a_container(inputs: Path, tmp_path: Path, name: str, runtime: str) -> None:
    data, out = tmp_path / f"data {name}", tmp_path / "runs" / name
    data.symlink_to(inputs / "data")
    site = validate(Site, {"container": {"runtime": runtime, "image": name, "mounts": [name]}})
    printed = run(job(inputs, out, site, data), tmp_path)
    mounts = [name, f"{out}:{out}", f"{data}:{data}"]
    if runtime == "pyxis":
        assert printed.srun == [f"--container-image={name}", f"--container-mounts={','.join(mounts)}"]
        assert printed.python == ["python3"]
    else:
        bind = [word for mount in mounts for word in ("--bind", mount)]
        assert printed.srun == []
        assert printed.python == ["apptainer", "exec", "--nv", *bind, name, "python3"]


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
@pytest.mark.parametrize("name", ["a,b", "a:b"])
def test_a_mount_cannot_name_every_folder(inputs: Path, tmp_path: Path, name: str, runtime: str) -> None:
    """Both runtimes take a comma for the end of a mount, and a colon for that of its first part."""
    data = tmp_path / name
    data.symlink_to(inputs / "data")
    site = validate(Site, {"container": {"runtime": runtime, "image": "torch", "mounts": []}})
    with pytest.raises(ConfigError):
        job(inputs, tmp_path / "run", site, data)


@pytest.mark.parametrize("value", MORE_HOSTILE)
def test_values_of_the_site(inputs: Path, tmp_path: Path, value: str) -> None:
    names = ("account", "partition", "qos", "reservation", "constraint", "exclude")
    site = Site(
        **dict.fromkeys(names, value),
        sbatch={"comment": value, "nice": None},
        python=value,
        network_interface=value,
        env={"VALUE": value},
        gpus="--gres=gpu:" + "".join(value.split()) + ":{n}",
    )
    prepared = job(inputs, tmp_path / "run", site, job_name=value)
    options = sbatch_options(prepared.text)
    assert options == prepared.options
    assert {options[name] for name in (*names, "comment", "job-name")} == {value}
    assert options["nice"] is None
    assert options["gres"] == f"gpu:{''.join(value.split())}:2"
    printed = run(prepared, tmp_path)
    assert printed.python == [value]
    assert printed.environment["VALUE"] == value
    assert printed.environment["NCCL_SOCKET_IFNAME"] == value
    assert printed.environment["GLOO_SOCKET_IFNAME"] == value.removeprefix("=")


@pytest.mark.parametrize("value", ["~", "~/x", "$HOME", "/a/${USER}/b"])
def test_what_a_shell_would_expand_is_refused(inputs: Path, tmp_path: Path, value: str) -> None:
    said = f"given {value!r}, but ~ and variables are not expanded here"
    for key, site in {
        "python": {"python": value},
        "env": {"env": {"A": value}},
        "container.image": {"container": {"runtime": "pyxis", "image": value}},
        "container.mounts.0": {"container": {"runtime": "apptainer", "image": "x", "mounts": [value]}},
    }.items():
        with pytest.raises(ConfigError, match=f"^{re.escape(f'{key}: {said}')}"):
            validate(Site, site)
    for key, given in {"output_dir": {"out": Path(value)}, "data.path": {"overrides": [f"data.path={value!r}"]},
                       "model.init_from": {"overrides": [f"model.init_from={value!r}"]}}.items():  # fmt: skip
        with pytest.raises(ConfigError, match=re.escape(f"{key}: {said}")):
            prepare(Request(template="train_98k", config=inputs / "run.yaml", **given))
    assert job(inputs, tmp_path / "run", Site(sbatch={"comment": value})).options["comment"] == value


def test_environment_of_the_submitter_is_kept(inputs: Path, tmp_path: Path) -> None:
    printed = run(job(inputs, tmp_path / "run"), tmp_path, PYTHONPATH="/own")
    assert printed.environment["PYTHONPATH"] == f"{tmp_path}/run/code:/own"


def test_a_site_cannot_put_other_code_before_the_copy(inputs: Path, tmp_path: Path) -> None:
    """OUT/code is what every job of a folder runs, whatever the site's modules and variables add."""
    site = Site(setup=["export PYTHONPATH=/of/a/module:$PYTHONPATH"], env={"UNRELATED": "x"})
    printed = run(job(inputs, tmp_path / "run", site), tmp_path)
    assert printed.environment["PYTHONPATH"].split(":")[0] == f"{tmp_path}/run/code"


@pytest.mark.parametrize("value", ["a\nb", "a\r\nb", "a\0b"])
def test_lines_in_an_environment_variable_are_refused(value: str) -> None:
    assert refusal({"env": {"VALUE": value}}) == f"env: given {value!r}, must be one line of text"


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\0b", "a\r\nb"])
def test_lines_in_folders_and_names_are_refused(inputs: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "runs" / name
    with pytest.raises(ConfigError) as error:
        job(inputs, out)
    of_folder = f"{str(out)!r}: a folder that jobs write to cannot have '\\n' in its name; choose another"
    of_line = f"{name!r} has a line break, which no job script can hold"
    assert str(error.value) == (of_folder if "\n" in name else of_line)
    with pytest.raises(ConfigError) as error:
        job(inputs, tmp_path / "run", job_name=name)
    assert str(error.value) == of_line
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b", ""])
def test_lines_in_a_site_are_refused(value: str) -> None:
    valid = f"given {value!r}, must be one line of text"
    for key in ("account", "partition", "qos", "reservation", "constraint", "exclude", "python", "network_interface",
                "gpus"):  # fmt: skip
        assert refusal({key: value}) == f"{key}: {valid}"
    assert refusal({"setup": ["module load", value]}) == f"setup.1: {valid}"
    assert refusal({"sbatch": {"comment": value}}) == f"sbatch.comment: {valid}"
    assert refusal({"container": {"runtime": "pyxis", "image": value}}) == f"container.image: {valid}"
    mounts = {"runtime": "pyxis", "image": "torch", "mounts": [value]}
    assert refusal({"container": mounts}) == f"container.mounts.0: {valid}"


def refusal(site: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as error:
        validate(Site, site)
    return str(error.value)


@pytest.mark.parametrize("character", ["%", ":", "\\"])
def test_characters_that_slurm_or_paths_take_for_more(inputs: Path, tmp_path: Path, character: str) -> None:
    out = tmp_path / "runs" / f"a{character}b"
    with pytest.raises(ConfigError) as error:
        job(inputs, out)
    valid = f"a folder that jobs write to cannot have {character!r} in its name; choose another"
    assert str(error.value) == f"{str(out)!r}: {valid}"
    assert not (tmp_path / "runs").exists()


def test_a_container_with_a_hostile_python(inputs: Path, tmp_path: Path) -> None:
    container = Container(runtime="apptainer", image="$(touch PWNED).sif")
    printed = run(job(inputs, tmp_path / "run", Site(container=container, python="my 'python'")), tmp_path)
    assert printed.python[-2:] == ["$(touch PWNED).sif", "my 'python'"]
