"""The allocator keeps freed memory: tensors are not mapped page by page again and again."""

import platform
import subprocess
import sys

import pytest

TENSORS, MEGABYTES, ROUNDS, PAGE = 12, 8, 20, 4096
COUNT_FAULTS = f"""
import resource, torch
from vae.memory import keep_freed_memory
keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def touch():
    return [torch.ones({MEGABYTES} * 2**18) for _ in range({TENSORS})]
for _ in range(3):
    touch()
before = faults()
for _ in range({ROUNDS}):
    touch()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_tensors_reuse_what_was_freed():
    """Pages are mapped with the first rounds, where glibc by itself maps all of them in each."""
    command = [sys.executable, "-c", COUNT_FAULTS]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    all_pages = TENSORS * MEGABYTES * 2**20 / PAGE
    assert int(found) < ROUNDS * all_pages / 4
