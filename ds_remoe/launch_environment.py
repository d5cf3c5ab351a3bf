"""What the launcher tells a rank by environment variables, before any process group exists."""

from __future__ import annotations

import os

RANKS_PER_NODE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")


def ranks_per_node() -> int | None:
    """Ranks on this machine, as torchrun (LOCAL_WORLD_SIZE) or DeepSpeed's launcher (LOCAL_SIZE) says; None if neither.

    Raises:
        ValueError: the variable is no positive whole number.
    """
    for name in RANKS_PER_NODE:
        text = os.environ.get(name)
        if text is None:
            continue
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{name} = {text!r}: must be the number of ranks on this machine, at least 1")
        return int(text)
    return None
