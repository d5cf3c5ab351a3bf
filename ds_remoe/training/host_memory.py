"""Memory of the host while training on the CPU."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def reuse_freed_memory() -> bool:
    """Let the C library keep freed memory for the next allocation instead of handing it back to the system.

    By default glibc maps each large tensor anew, and the system fills it with zeros page by page as it is first
    written; for the gradients of many experts that is a good part of a step. The process then keeps the most memory
    that it ever had, and gaps between what is alive, until `MemoryRelief` gives them back.

    Returns:
        False where the C library is not glibc, and nothing was changed.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    top_pad = 64 * 2**20
    return all([libc.mallopt(M_MMAP_MAX, 0), libc.mallopt(M_TRIM_THRESHOLD, -1), libc.mallopt(M_TOP_PAD, top_pad)])


class MemoryRelief:
    """Gives the memory that `reuse_freed_memory` keeps back to the system where it runs short.

    Args:
        least_share: of the machine's memory, or of this container's limit, that should stay available.
        interval: seconds between two looks, at least.
    """

    def __init__(self, least_share: float = 0.1, interval: float = 1.0) -> None:
        self.least_share, self.interval = least_share, interval
        self._looked = -float("inf")
        self._told = False

    def look(self) -> str | None:
        """Give back what is free if memory is short; what to tell the user, the first time that it was."""
        now = time.monotonic()
        if now - self._looked < self.interval:
            return None
        self._looked = now
        left, libc = available_share(), ctypes.CDLL(None)
        if left >= self.least_share or not hasattr(libc, "malloc_trim"):
            return None
        libc.malloc_trim(0)
        if self._told:
            return None
        self._told = True
        return (
            f"memory was short, {left:.0%} of the host's were available: freed memory goes back to the system, which "
            "slows steps down; lower train_micro_batch_size_per_gpu, or start fewer ranks on this host"
        )


def available_share() -> float:
    """Share of the machine's memory that is available, or of the container's limit if less is left there."""
    memory = psutil.virtual_memory()
    return min(memory.available / memory.total, *(_left_of_limit(*files) for files in _CGROUPS))


_CGROUPS = (  # limit, statistics, and the field of memory that cannot be reclaimed; of cgroup v2 and v1
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.stat"), "anon"),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.stat"), "total_rss"),
)


def _left_of_limit(limit: Path, statistics: Path, field: str) -> float:
    try:
        most = int(limit.read_text(encoding="ascii"))
        used = dict(line.split() for line in statistics.read_text(encoding="ascii").splitlines())
        return 1 - int(used[field]) / most
    except (OSError, ValueError, KeyError, ZeroDivisionError):  # no such cgroup, or "max": no limit
        return 1.0
