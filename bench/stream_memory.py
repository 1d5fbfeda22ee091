"""Peak memory of a training that streams, against the size of its data.

    python -m bench.stream_memory --images 20000 200000

Random RGB images of 64 by 64, 12 kB each, prepared and trained for an epoch by the real stages with
`training.memory_limit_mb` far below their size. Memory is that of the train stage and of every
process below it, Ray's included, shared pages counted once (PSS), twice a second.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

from tests.end_to_end.conftest import Project, finish

SIDE, CHUNK = 64, 10_000
MEGABYTE = 2**20
SETTINGS = {
    "data.source": "npy",
    "data.root": "data/own/images.npy",
    "data.limit": None,
    "model.hidden": [8],
    "model.latent_dim": 2,
    "model.likelihood": "gaussian_unit",
    "training.epochs": 1,
    "training.batch_size": 512,
    "training.memory_limit_mb": 16,
    "scaling.num_workers": 2,
}


def write_images(path: Path, count: int) -> None:
    """Noise."""
    rng = np.random.default_rng(0)
    shape = (count, SIDE, SIDE, 3)
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    for start in range(0, count, CHUNK):
        part = images[start : start + CHUNK]
        part[:] = rng.integers(0, 256, part.shape, dtype=np.uint8)


def memory_mb(root: psutil.Process) -> float:
    """Of a process and all below it, in MB."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return total / MEGABYTE


def peak_memory_mb(process: subprocess.Popen[str]) -> float:
    """Of a process and all below it until it ends, in MB, seen twice a second."""
    root, peak = psutil.Process(process.pid), 0.0
    while process.poll() is None:
        try:
            peak = max(peak, memory_mb(root))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.5)
    return peak


def measure(folder: Path, count: int) -> dict[str, float]:
    project = Project.create(folder)
    write_images(folder / "data" / "own" / "images.npy", count)
    project.change(SETTINGS)
    for stage in ("prepare", "selfcheck", "sweep"):
        project.stage(stage)
    process = project.start(*project.stage_command("train"))
    peak = peak_memory_mb(process)
    finish(process)
    history = pd.read_csv(folder / "reports" / "train" / "history.csv")
    return {
        "images": count,
        "data, MB": count * SIDE * SIDE * 3 / 1e6,
        "peak memory, MB": peak,
        "images/s": float(history["images_per_s"].iloc[-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[20_000, 200_000])
    for count in parser.parse_args().images:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(Path(folder), count), flush=True)


if __name__ == "__main__":
    main()
