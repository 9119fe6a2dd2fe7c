"""What the kernels that move rows have in common: the tile of a program, and which rows lie in memory."""

from __future__ import annotations


def first_stored(num_levels: int) -> int:
    """The finest level whose pooled rows are stored.

    The p rows under a gathered entry of level 1 are read again instead: for k <= N / p^3 no more bytes than writing
    the level and reading what is gathered of it. The coarsest level is gathered whole, so it is always stored.
    """
    return min(2, num_levels - 1)


def power_of_two(at_least: int) -> int:
    """The smallest power of two that is at least `at_least`."""
    return 1 << (at_least - 1).bit_length()


def tile(elements: int, head_dim: int, heads_per_group: int) -> tuple[int, dict[str, int]]:
    """A tile [rows, W] of about `elements`, W being the width of one KV head's rows in powers of two.

    Returns:
        The rows, and the constants that kernels name alike.
    """
    block_d = power_of_two(head_dim)
    width = block_d * power_of_two(heads_per_group)
    return max(1, elements // width), {"HEADS": heads_per_group, "D": head_dim, "BLOCK_D": block_d, "W": width}
