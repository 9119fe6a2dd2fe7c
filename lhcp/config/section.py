"""What all sections of the configuration have in common."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(strict=True, ge=1)]


class ConfigError(ValueError):
    """A value the user can correct; the message says which and how."""


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


TextT = TypeVar("TextT", str, Path)


def written_out(path: TextT) -> TextT:
    """Refuse what a shell would expand, which nothing does here: a folder of that name would be made.

    Raises:
        ValueError: saying so.
    """
    if str(path).startswith("~") or re.search(r"\$[A-Za-z_{]", str(path)):
        raise ValueError(
            f"given {str(path)!r}, but ~ and variables are not expanded here; write it out, or, on a command line, "
            f"leave the quotes out"
        )
    return path


WrittenPath = Annotated[Path, AfterValidator(written_out)]


def nearest_multiples(value: int, step: int, at_least: int = 1) -> str:
    """Of `step`, around `value` and not below `at_least`, in words."""
    below = value // step * step
    above = max(below + step, -(-at_least // step) * step)
    return f"{below} or {above}" if below >= at_least else str(above)
