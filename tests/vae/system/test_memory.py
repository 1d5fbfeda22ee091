"""Memory: what the allocator keeps, and what large examples take."""

import platform
import subprocess
import sys

import pytest

TENSORS, MEGABYTES, ROUNDS, PAGE = 12, 8, 20, 4096
COUNT_FAULTS = f"""
import resource, torch
from vae.system import keep_freed_memory
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

STATISTICS = """
import resource, torch
from vae.data import Dataset
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
x = torch.zeros(60, 3, 512, 512, dtype=torch.uint8)
before = peak()
Dataset(train=x, valid=x[:1]).statistics()
print(peak() - before)
"""


def run(code: str) -> float:
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_tensors_reuse_what_was_freed():
    """Pages are mapped with the first rounds, where glibc by itself maps all of them in each."""
    all_pages = TENSORS * MEGABYTES * 2**20 / PAGE
    assert run(COUNT_FAULTS) < ROUNDS * all_pages / 4


def test_statistics_of_large_images_take_little():
    """47 million values would be 377 MB of float64, and as much again squared."""
    assert run(STATISTICS) < 150
