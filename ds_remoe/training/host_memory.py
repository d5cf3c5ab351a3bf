"""Memory of the host while training on the CPU."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def reuse_freed_memory() -> bool:
    """Let the C library keep freed memory for the next allocation instead of handing it back to the system.

    By default glibc maps each large tensor anew, and the system fills it with zeros page by page as it is first
    written; for the gradients of many experts that is a good part of a step. The process then keeps the most memory
    that it ever had, to its end.

    Returns:
        False where the C library is not glibc, and nothing was changed.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    top_pad = 64 * 2**20
    return all([libc.mallopt(M_MMAP_MAX, 0), libc.mallopt(M_TRIM_THRESHOLD, -1), libc.mallopt(M_TOP_PAD, top_pad)])
