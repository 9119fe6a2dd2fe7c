"""What all sections of the configuration have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(strict=True, ge=1)]


class ConfigError(ValueError):
    """A value the user can correct; the message says which and how."""


class Section(BaseModel):
    """Base of all sections: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def nearest_multiples(value: int, step: int) -> str:
    """Of `step`, around `value`, in words."""
    below = value // step * step
    return f"{below} or {below + step}" if below else str(step)
