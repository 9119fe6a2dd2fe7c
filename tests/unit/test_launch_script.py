"""Job scripts: golden files, sound shell, what sbatch reads in them, time limits."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from golden.sbatch_rule import sbatch_arguments, sbatch_options
from golden.update import CASES, GOLDEN, SITE, prepared, rendered, write_inputs
from lhcp.config import ConfigError
from lhcp.launch import script
from lhcp.launch.prepare import Prepared, Request, prepare
from lhcp.launch.site import Site

REPOSITORY = Path(__file__).resolve().parents[2]
SLURM = REPOSITORY / "slurm"
NAMES = ["latency", "preflight", "recoverability", "sweep", "train_1m", "train_98k"]
FILES = [*sorted(SLURM.glob("*.sbatch")), *sorted((SLURM / "lib").glob("*.sh")), *sorted(GOLDEN.glob("*.sbatch"))]
OPTION_LINE = "must be '#SBATCH --name=value' with a comment or without, and no other lines between the options"
NO_LINES = (
    "is no job template: it must have #SBATCH lines and a line '#LHCP needs=config trains=yes' (needs: config, grid or "
    "nothing; trains: yes or no)"
)
needs_shellcheck = pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


def test_the_parser_of_these_tests() -> None:
    cases = {
        "--a=b  # c": ["--a=b"],
        "--a='b c' --d": ["--a=b c", "--d"],
        r'--a="b \" \\ # c"': [r'--a=b " \ # c'],
        r"--a='b \' c'": ["--a=b ' c"],
        r"--a=\#b\ c": ["--a=#b c"],
        '--a="it\'s"#b': ["--a=it's"],
        "": [],
    }
    assert {line: sbatch_arguments(line) for line in cases} == cases


@given(st.text(st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs"])))
@example('"')
@example("\\")
@example('\\"')
@example("a # b")
@example("it's")
@example("--x y")
@example("\t")
@example("")
def test_sbatch_reads_what_was_quoted(value: str) -> None:
    assert sbatch_arguments(f" --name={script.quote(value)}") == [f"--name={value}"]
    assert sbatch_arguments(f" --name={script.quote(value)}  # a note") == [f"--name={value}"]


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b", "\n"])
def test_more_than_one_line_cannot_be_quoted(value: str) -> None:
    with pytest.raises(ConfigError) as error:
        script.quote(value)
    assert str(error.value) == f"{value!r} has a line break, which no job script can hold"


def test_golden_files(tmp_path: Path) -> None:
    """To write them anew: python tests/golden/update.py."""
    scripts = rendered(tmp_path)
    assert {path.name for path in GOLDEN.glob("*.sbatch")} == scripts.keys()
    for name, text in scripts.items():
        assert text == (GOLDEN / name).read_text(encoding="utf-8"), name


@pytest.mark.parametrize(("template", "container"), CASES)
def test_sbatch_reads_the_options_in_a_script(inputs: Path, template: str, container: str | None) -> None:
    job: Prepared = prepared(inputs, template, container, "run")
    assert list(sbatch_options(job.text).items()) == list(job.options.items())
    of_site = {
        "account": "proj-17",
        "partition": "b200,b200-long",
        "qos": "high",
        "reservation": "maintenance window",
        "constraint": "b200&nvme",
        "exclude": "n[3,7]",
        "comment": 'say "hi" #1',
        "spread-job": None,
        "mail-user": "a.user@example.org",
        "gres": f"gpu:b200:{1 if template == 'latency' else 8}",
    }
    assert job.options.items() >= of_site.items()
    assert all(f"{name}:" in SITE for name in of_site if name != "gres")
    assert "gpus-per-node" not in job.options


def test_templates_by_name() -> None:
    assert script.names() == NAMES
    for name in NAMES:
        template = script.read(name)
        assert template.name == name
        assert template.summary.endswith(".")
        # The lines that it was read from come out of it again.
        lines = (SLURM / f"{name}.sbatch").read_text().split("\n")
        options = [line.split("  #")[0] for line in lines if line.startswith("#SBATCH")]
        again = template.render(template.options, "").split("\n")
        assert [line.split("  #")[0].rstrip() for line in again if line.startswith("#SBATCH")] == options


def test_a_template_does_not_run_by_itself() -> None:
    for name in NAMES:
        done = subprocess.run(["bash", SLURM / f"{name}.sbatch"], env={"PATH": "/usr/bin:/bin"}, capture_output=True)
        assert done.returncode != 0
        assert done.stdout == b""
        assert done.stderr.endswith(b"LHCP_OUT: this is a template: submit it by lhcp launch sbatch\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo hi\n", NO_LINES),
        ("#SBATCH --nodes=1\n", NO_LINES),
        ("#LHCP needs=foo trains=no\n#SBATCH --nodes=1\n", NO_LINES),
        (
            "#LHCP needs=nothing trains=no\n#SBATCH --nodes=1\n# between\n#SBATCH --time=5\n",
            f", line 3: {OPTION_LINE}",
        ),
        (
            "#LHCP needs=nothing trains=no\n#SBATCH -N 1\n",
            f", line 2: {OPTION_LINE}",
        ),
    ],
)
def test_what_is_no_template(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.sbatch"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        script.read(str(path))
    assert str(error.value) == f"{path}{message if message.startswith(',') else f' {message}'}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_bash_can_parse(path: Path) -> None:
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def shellcheck(path: Path) -> str:
    # Templates name their libraries as lib/..., libraries each other without.
    command = ["shellcheck", "--norc", "-x", "-P", "lib", path]
    done = subprocess.run(command, cwd=SLURM, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout


@needs_shellcheck
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path) -> None:
    assert shellcheck(path) == ""


@needs_shellcheck
def test_shellcheck_finds_nothing_wrong_with_an_exact_interface(inputs: Path, tmp_path: Path) -> None:
    """=bond0 is how NCCL_SOCKET_IFNAME names one interface, and no prefix."""
    path = tmp_path / "job.sbatch"
    path.write_text(prepare(Request(template="preflight", out=tmp_path, site=Site(network_interface="=bond0"))).text)
    assert shellcheck(path) == ""


def test_one_finding_alone_is_disabled() -> None:
    """SC2034: that a variable is not used in this file; another one uses it."""
    assert len(FILES) == 17
    directives = [match for path in FILES for match in re.findall(r"shellcheck disable=(\S+)", path.read_text())]
    assert directives == ["SC2034"] * len(list(GOLDEN.glob("*.sbatch")))


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("1", 60),
        ("90", 5_400),
        ("1:30", 90),
        ("2:03:04", 7_384),
        ("24:00:00", 86_400),
        ("1-0", 86_400),
        ("1-2", 93_600),
        ("1-2:03", 93_780),
        ("1-02:03:04", 93_784),
        ("infinite", None),
        ("UNLIMITED", None),
    ],
)
def test_time_limits(limit: str, seconds: int | None) -> None:
    """As `man sbatch` says, --time."""
    assert script.seconds(limit) == seconds


def test_a_time_limit_of_zero_is_none() -> None:
    """`man sbatch`: a time limit of zero requests that no time limit be imposed."""
    assert [script.seconds(limit) for limit in ("0", "0:00", "00:00:00", "0-0")] == [None] * 4


@pytest.mark.parametrize("limit", ["soon", "", "1h", "1.5", "-1:00", "1:2:3:4", "1-", "1-2:3:4:5", " 5", "5\n", "1:"])
def test_what_is_no_time_limit(limit: str) -> None:
    with pytest.raises(ConfigError) as error:
        script.seconds(limit)
    valid = "minutes, hours:minutes:seconds, days-hours"
    assert str(error.value) == f"time {limit!r} is no time limit; valid: {valid}"
