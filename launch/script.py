"""Job scripts of Slurm: reading their #SBATCH lines, and writing them with other values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lhcp.config import ConfigError
from lhcp.launch.snapshot import PACKAGE

_OPTION = re.compile(r"#SBATCH --([a-z0-9-]+)(?:=(\S*))?(\s+#.*)?")
_NEEDS = re.compile(r"#LHCP needs=(config|grid|nothing) trains=(yes|no)")

Options = dict[str, str | None]
"""Long options of sbatch without dashes; None: a flag."""


@dataclass(frozen=True)
class Script:
    """A template: `slurm/*.sbatch`."""

    name: str
    head: tuple[str, ...]
    """Lines before the first option: what the job is."""
    options: Options
    notes: Mapping[str, str]
    """Comments behind options."""
    body: str
    """Everything after the last option."""
    needs: str
    """What it is submitted with: `config`, a run's YAML file; `grid`, many (see lhcp.launch.grid); `nothing`."""
    trains: bool
    """Whether it trains, so that the configuration's data and run folder must be in order."""

    @property
    def summary(self) -> str:
        """The first line of what it says of itself."""
        return next((line.removeprefix("# ") for line in self.head if line.startswith("# ")), "")

    def render(self, options: Options, prelude: str) -> str:
        """The script with these options, and shell lines before its own."""
        lines = {name: f"#SBATCH --{name}" + ("" if value is None else f"={quote(value)}")
                 for name, value in options.items()}  # fmt: skip
        # A note tells of the template's value, and not of another.
        notes = {name: note for name, note in self.notes.items() if options.get(name) == self.options[name]}
        width = max((len(lines[name]) for name in notes), default=0)
        noted = [f"{line.ljust(width)}  # {notes[name]}" if name in notes else line for name, line in lines.items()]
        return "\n".join([*self.head, *noted, "", prelude, self.body.strip("\n"), ""])


def names() -> list[str]:
    """Of the templates that come with the package."""
    return sorted(path.stem for path in (PACKAGE / "slurm").glob("*.sbatch"))


def read(name: str) -> Script:
    """The template of this name, or the file.

    Raises:
        ConfigError: there is none, or it is no template.
    """
    path = Path(name) if name.endswith(".sbatch") else PACKAGE / "slurm" / f"{name}.sbatch"
    if not path.is_file():
        raise ConfigError(f"no job template {name}; valid: {', '.join(names())}, or a file that ends with .sbatch")
    return parse(path.read_text(encoding="utf-8"), path)


def parse(text: str, path: Path) -> Script:
    """See `read`."""
    lines = text.split("\n")
    numbers = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    needs = next((match for line in lines if (match := _NEEDS.fullmatch(line))), None)
    if not numbers or needs is None:
        raise ConfigError(
            f"{path} is no job template: it must have #SBATCH lines and a line '#LHCP needs=config trains=yes' (needs: "
            "config, grid or nothing; trains: yes or no)"
        )
    first, last = numbers[0], numbers[-1]
    options: Options = {}
    notes = {}
    for number in range(first, last + 1):
        match = _OPTION.fullmatch(lines[number])
        if match is None:
            raise ConfigError(
                f"{path}, line {number + 1}: must be '#SBATCH --name=value' with a comment or without, and no other "
                f"lines between the options"
            )
        options[match[1]] = match[2]
        if match[3]:
            notes[match[1]] = match[3].strip().removeprefix("#").strip()
    head = tuple(line for line in lines[:first] if not _NEEDS.fullmatch(line))
    return Script(path.stem, head, options, notes, "\n".join(lines[last + 1 :]), needs[1], needs[2] == "yes")


def quote(value: str) -> str:
    """`value` as sbatch reads it in a script: in quotes, with backslashes, unless it is plain.

    Raises:
        ConfigError: a value of more than one line, which no script can hold.
    """
    if "\n" in value or "\r" in value or "\x00" in value:
        raise ConfigError(f"{value!r} has a line break, which no job script can hold")
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./\[\]{}-]+", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def seconds(limit: str | None) -> int | None:
    """A time limit of sbatch (minutes, m:s, h:m:s, d-h, d-h:m, d-h:m:s) in seconds; None: no limit.

    Raises:
        ConfigError: it is none.
    """
    if limit is not None and limit.lower() in ("infinite", "unlimited"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit or "")
    if match is None:
        raise ConfigError(f"time {limit!r} is no time limit; valid: minutes, hours:minutes:seconds, days-hours")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None or match[4] is not None:
        total = days * 86_400 + first * 3_600 + second * 60 + third
    else:
        total = first * 60 + second
    return total or None  # 0 is no limit, too
