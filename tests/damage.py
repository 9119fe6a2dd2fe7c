"""Damage to files, as disks and interrupted copies cause it."""

from __future__ import annotations

from pathlib import Path
from random import Random


def damage(path: Path, random: Random) -> str:
    """Change the content of `path`: flip one bit, cut off its end or lengthen it, each at a random place.

    Returns:
        What was done, for the message of a test that fails.
    """
    content = path.read_bytes()
    kind = random.choice(["flip", "cut", "lengthen"] if content else ["lengthen"])
    if kind == "flip":
        place, bit = random.randrange(len(content)), random.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        return f"{path.name}: bit {bit} of byte {place} of {len(content)} flipped"
    if kind == "cut":
        size = random.randrange(len(content))
        path.write_bytes(content[:size])
        return f"{path.name}: cut from {len(content)} to {size} bytes"
    added = random.randbytes(random.randint(1, 64))
    path.write_bytes(content + added)
    return f"{path.name}: {len(added)} bytes added to {len(content)}"
