"""How much is held at a time, and how the C library's allocator treats what was freed."""

from __future__ import annotations

import ctypes
from functools import cache

from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT, MOST_KEPT = 32 * 2**20, 256 * 2**20  # bytes; the former is glibc's own limit

CHUNK_VALUES = {"cpu": 2**20, "cuda": 2**26}
"""Decoder outputs held at a time by default: the fastest on a CPU, a few hundred MB on a GPU."""


def samples_at_once(x: Tensor) -> int:
    """Samples of each example of x (B, *data_shape) that are decoded at a time by default."""
    values = max(1, x[:1].numel()) * max(1, len(x))
    return max(1, CHUNK_VALUES.get(x.device.type, CHUNK_VALUES["cpu"]) // values)


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
