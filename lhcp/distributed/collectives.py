"""Collectives in the one form that this project uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lhcp.config import ConfigError

T = TypeVar("T")


class SharedError(ConfigError):
    """What every rank knows that the user can correct; one of them should tell."""


def on_rank_zero(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, the only one to run it, on every rank (collective).

    Raises:
        SharedError: on every rank, when it raises ConfigError or OSError there.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except (ConfigError, OSError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise SharedError(outcome[1])
    value: T = outcome[0]
    return value


def complaints(action: Callable[[], object]) -> list[str]:
    """Messages of the ConfigErrors that `action` raises, of all ranks, on every rank (collective)."""
    message = None
    try:
        action()
    except ConfigError as error:
        message = str(error)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    return [text for text in messages if text is not None]
