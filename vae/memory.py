"""How the C library's allocator treats freed memory."""

from __future__ import annotations

import ctypes
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT, MOST_KEPT = 32 * 2**20, 256 * 2**20  # bytes; the former is glibc's own limit


@cache
def keep_freed_memory() -> None:
    """Have glibc reuse the memory of freed tensors, in the whole process.

    By itself it returns tensors of some MB to the kernel and maps them anew, page by page: up to a
    third of the time of importance sampling. Elsewhere than on glibc nothing is changed.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)
    mallopt(M_TRIM_THRESHOLD, MOST_KEPT)
