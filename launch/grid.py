"""Many runs or measurements as one job array: a YAML file that says how they differ. Imports no torch.

config: launch/configs/98k.yaml        # what they have in common
arms:                                  # name: keys that differ
  dense: {stages: [{mode: dense, steps: 16000}]}
  lighthouse: {}
vary:                                  # each arm at every combination of these
  seed: [0, 1]
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lhcp import config_file
from lhcp.config import ConfigError, Section
from lhcp.config.validation import validate
from lhcp.launch.jobs import JOBS_FOLDER
from lhcp.launch.snapshot import CODE_FOLDER


class Grid(Section):
    """A grid file."""

    config: Path
    """Configuration that all elements start from; relative to the current directory."""
    arms: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Overrides (KEY: value, keys with dots) by the name of an arm; none: one arm without overrides."""
    vary: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    """Values of keys, combined in every way."""


@dataclass(frozen=True)
class Element:
    """One job of the array."""

    name: str
    """Of its folder or result."""
    overrides: tuple[str, ...]
    """KEY=VALUE, as --set takes them."""


def is_grid(path: Path) -> bool:
    """Whether a YAML file is a grid and not a run's configuration.

    Raises:
        ConfigError: it cannot be read.
    """
    return "config" in config_file.read_mapping(path)


def load(path: Path) -> tuple[Path, list[Element]]:
    """Read a grid file: the common configuration, and the elements in order.

    Raises:
        ConfigError: wrong keys, names that cannot be a folder's, or nothing to vary.
    """
    try:
        grid = validate(Grid, config_file.read_mapping(path))
    except ConfigError as error:
        message = str(error)
        raise ConfigError(message if message.startswith(str(path)) else f"{path}: {message}") from None
    return grid.config, _elements(path, grid)


def _elements(path: Path, grid: Grid) -> list[Element]:
    elements = []
    for arm, changes in (grid.arms or {"": {}}).items():
        for values in product(*grid.vary.values()):
            varied = dict(zip(grid.vary, values, strict=True))
            parts = [arm] * bool(arm) + [f"{key.rpartition('.')[2]}={value}" for key, value in varied.items()]
            overrides = tuple(f"{key}={json.dumps(value, default=str)}" for key, value in (changes | varied).items())
            elements.append(Element(",".join(parts), overrides))
    if len(elements) < 2:
        raise ConfigError(f"{path}: its arms and vary make one job, which needs no grid; submit the configuration")
    wrong = [element.name for element in elements if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.,=+-]*", element.name)]
    if wrong:
        raise ConfigError(f"{path}: {wrong[0]!r} cannot name a folder; name arms by letters, digits and any of _.,=+-")
    if taken := {JOBS_FOLDER, CODE_FOLDER} & {element.name for element in elements}:
        raise ConfigError(f"{path}: an element cannot be named {taken.pop()!r}: that folder is for the jobs themselves")
    _check_distinct(path, [element.name for element in elements])
    return elements


def _check_distinct(path: Path, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path}: two elements are named {name!r}; name the arms apart")
