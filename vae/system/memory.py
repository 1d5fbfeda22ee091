"""How much is held at a time, and how the C library's allocator treats what was freed."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache

from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT, MOST_KEPT = 32 * 2**20, 256 * 2**20  # bytes; the former is glibc's own limit


def samples_at_once(x: Tensor, chunk_values: Mapping[str, int]) -> int:
    """Samples of each example of x (B, *data_shape) that are decoded at a time.

    chunk_values: by device type, "cpu" among them, the data values decoded at a time.
    """
    values = max(1, x[:1].numel()) * max(1, len(x))
    return max(1, chunk_values.get(x.device.type, chunk_values["cpu"]) // values)


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
