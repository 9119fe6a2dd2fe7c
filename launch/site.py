"""The site file: what differs between clusters. Imports no torch.

Templates are the same for everyone; `cluster.yaml` makes them run here. It is looked for at --site, $LHCP_SITE and
~/.config/lhcp/cluster.yaml; without one, jobs are submitted with nothing but the template's own settings.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator

from lhcp import config_file
from lhcp.config import ConfigError, Section, written_out
from lhcp.config.validation import validate

SITE_VARIABLE = "LHCP_SITE"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _one_line(value: str) -> str:
    if not value or "\n" in value or "\r" in value or "\x00" in value:
        raise ValueError(f"given {value!r}, must be one line of text")
    return value


def _text(value: object) -> object:
    """YAML reads some names as numbers."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _flag(value: object) -> object:
    return None if value is True else value


Line = Annotated[str, BeforeValidator(_text), AfterValidator(_one_line)]
Written = Annotated[Line, AfterValidator(written_out)]


class Container(Section):
    """Where the processes of a job run; the job's script itself runs outside."""

    runtime: Literal["pyxis", "apptainer"]
    """`pyxis`: srun's --container-image; `apptainer`: apptainer exec."""
    image: Written
    mounts: list[Written] = Field(default_factory=list)
    """HOST:INSIDE[:MODE]; the run folder and the data are mounted in any case, where they are."""


class Site(Section):
    """What a cluster wants. Keys left out are left to Slurm."""

    account: Line | None = None
    partition: Line | None = None
    qos: Line | None = None
    reservation: Line | None = None
    constraint: Line | None = None
    """Node features, such as b200."""
    exclude: Line | None = None
    """Nodes not to take, such as n[3,7]; `preflight` finds them."""
    gpus: Line = "--gpus-per-node={n}"
    """How n GPUs of each node are asked for: --gpus-per-node={n}, --gres=gpu:{n}, --gres=gpu:b200:{n}, ..."""
    sbatch: dict[Line, Annotated[Line | None, BeforeValidator(_flag)]] = Field(default_factory=dict)
    """Any other options of sbatch, by long name without dashes; null or true: a flag without a value."""
    setup: list[Line] = Field(default_factory=list)
    """Shell lines that make Python and CUDA available: modules, a virtual environment. One that fails ends the job."""
    python: Written | None = None
    """The Python that trains: a path, or a name found on PATH after `setup`. None: the one that submits; in a
    container, python3."""
    container: Container | None = None
    network_interface: Line | None = None
    """For NCCL's and gloo's sockets, such as ib0 or =bond0 (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)."""
    env: dict[Line, Annotated[str, BeforeValidator(_text)]] = Field(default_factory=dict)
    """Environment variables of jobs, as they stand here; they go before the defaults of slurm/lib/environment.sh. What
    is made of other variables is a line of `setup`: export A=$B/c."""

    @field_validator("gpus")
    @classmethod
    def _asks_for_gpus(cls, value: str) -> str:
        if not re.fullmatch(r"--[a-z-]+=\S*\{n\}\S*", value):
            raise ValueError(
                f"given {value!r}, must be one option of sbatch with {{n}} in it, such as --gres=gpu:{{n}}"
            )
        return value

    @field_validator("sbatch")
    @classmethod
    def _names_options(cls, value: dict[str, str | None]) -> dict[str, str | None]:
        for name in value:
            check_option(name)
        return value

    @field_validator("env")
    @classmethod
    def _names_variables(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"given {name!r}, must be the name of an environment variable")
            if text:
                written_out(_one_line(text))
        return value

    def options(self) -> dict[str, str | None]:
        """Options of sbatch, but for the GPUs."""
        named = {name: getattr(self, name) for name in
                 ("account", "partition", "qos", "reservation", "constraint", "exclude")}  # fmt: skip
        return {name: value for name, value in named.items() if value is not None} | self.sbatch

    def gpu_option(self, count: int) -> tuple[str, str]:
        """Name and value of the option that asks for `count` GPUs of each node."""
        name, _, value = self.gpus.removeprefix("--").partition("=")
        return name, value.replace("{n}", str(count))

    @property
    def uses_this_python(self) -> bool:
        """Whether jobs run the Python that submits."""
        return self.python is None and self.container is None

    def interpreter(self) -> str:
        """The Python of the job's processes."""
        return self.python or (sys.executable if self.container is None else "python3")

    def command(self, paths: list[Path]) -> tuple[list[str], list[str]]:
        """How a Python process of the job is started.

        Args:
            paths: files and folders that it needs.

        Returns:
            Further arguments of srun, and the command line up to Python's own arguments.
        """
        if self.container is None:
            return [], [self.interpreter()]
        if unclear := [path for path in paths if "," in str(path) or ":" in str(path)]:
            raise ConfigError(f"{unclear[0]} cannot be mounted in a container, since it has , or : in its name")
        mounts = [*self.container.mounts, *(f"{path}:{path}" for path in paths)]
        if self.container.runtime == "pyxis":
            srun = [f"--container-image={self.container.image}", f"--container-mounts={','.join(mounts)}"]
            return srun, [self.interpreter()]
        bind = [word for mount in mounts for word in ("--bind", mount)]
        return [], ["apptainer", "exec", "--nv", *bind, self.container.image, self.interpreter()]

    def exports(self) -> list[str]:
        """Shell lines that set the environment."""
        variables = dict(self.env)
        if self.network_interface is not None:
            sockets = {"NCCL_SOCKET_IFNAME": self.network_interface}
            if not self.network_interface.startswith("^"):  # gloo takes names only
                sockets["GLOO_SOCKET_IFNAME"] = self.network_interface.removeprefix("=")
            variables = sockets | variables
        return [f"export {name}={shell_quote(value)}" for name, value in variables.items()]


def shell_quote(value: str) -> str:
    """As one word of the shell, also where `shlex.quote` would leave it bare, which linters then wonder about."""
    return value if re.fullmatch(r"[\w@%+./-]+", value, re.ASCII) else "'" + value.replace("'", "'\"'\"'") + "'"


def check_option(name: str) -> None:
    """Refuse what is not the long name of an option of sbatch, or is set by the launcher itself.

    Raises:
        ValueError: saying so.
    """
    if not re.fullmatch(r"[a-z][a-z0-9-]+", name):
        raise ValueError(f"given {name!r}, must be the long name of an option of sbatch, such as cpus-per-task")
    if name in ("output", "error", "array", "wrap", "chdir", "parsable"):
        raise ValueError(f"{name} cannot be set: the launcher does")


def load_site(path: Path | None = None) -> Site:
    """Read the site file `path`, or the one found; an empty site where there is none.

    Raises:
        ConfigError: a file that was named does not exist; wrong values, each with what is valid.
    """
    named = path or (Path(os.environ[SITE_VARIABLE]) if os.environ.get(SITE_VARIABLE) else None)
    default = Path("~/.config/lhcp/cluster.yaml").expanduser()
    if named is None and not default.exists():
        return Site()
    file = named or default
    try:
        return validate(Site, config_file.read_mapping(file))
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(str(file)) else f"{file}: {message}") from None
