"""The allocator keeps freed memory: tensors are not mapped page by page again and again."""

import platform
import subprocess
import sys

import pytest

ROUNDS, MEGABYTES, PAGE = 20, 8, 4096
COUNT_FAULTS = f"""
import resource, torch
from vae.memory import keep_freed_memory
keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.zeros({MEGABYTES} * 2**18)
before = faults()
for _ in range({ROUNDS}):
    torch.zeros({MEGABYTES} * 2**18) + torch.zeros({MEGABYTES} * 2**18)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_tensors_reuse_what_was_freed():
    """Three tensors are alive at a time; their pages are touched first once, not in each round."""
    command = [sys.executable, "-c", COUNT_FAULTS]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(found) < 2 * 3 * MEGABYTES * 2**20 / PAGE
