"""Peak memory and time of the prepare stage against the number of examples.

    python bench/prepare_memory.py [--rows 100000 1000000] [--images 10000 100000]

A table of 10 columns as CSV and grey images of 32 by 32 as npy, each prepared by the real command
in a process of its own. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

ROOT = Path(__file__).parents[1]
COLUMNS = 10
CHUNK = 10_000


def table(path: Path, rows: int) -> dict[str, object]:
    """Independent normal columns."""
    rng = np.random.default_rng(0)
    for start in range(0, rows, CHUNK):
        x = rng.standard_normal((min(CHUNK, rows - start), COLUMNS))
        frame = pd.DataFrame(x, columns=[f"x{i}" for i in range(COLUMNS)])
        frame.to_csv(path, mode="a", header=start == 0, index=False, float_format="%.6f")
    return {"source": "table", "root": path.name, "space": "continuous"}


def images(path: Path, count: int) -> dict[str, object]:
    """Noise."""
    rng = np.random.default_rng(0)
    x = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, 32, 32))
    for start in range(0, count, CHUNK):
        part = x[start : start + CHUNK]
        part[:] = rng.integers(0, 256, part.shape, dtype=np.uint8)
    return {"source": "npy", "root": path.name, "space": "grey8"}


def measure(folder: Path, data: dict[str, object]) -> tuple[float, float, float]:
    """Seconds, peak memory and size of the prepared data, in MB."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content["data"] |= data | {"limit": None}
    if data["space"] == "continuous":
        content["sweep"]["likelihood"] = ["gaussian"]
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "pipeline.prepare", "--prepared", "prepared"]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"prepare ended with {os.waitstatus_to_exitcode(status)}")
    size = sum(path.stat().st_size for path in (folder / "prepared").rglob("*.parquet"))
    return time.perf_counter() - started, usage.ru_maxrss / 1024, size / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--images", type=int, nargs="*", default=[10_000, 100_000, 400_000])
    asked = parser.parse_args()
    print("| data | seconds | peak memory, MB | prepared, MB |\n|---|---|---|---|")
    cases = [("rows", "t.csv", table, count) for count in asked.rows]
    cases += [("images", "x.npy", images, count) for count in asked.images]
    for name, file, make, count in cases:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            seconds, memory, size = measure(folder, make(folder / file, count))
        print(f"| {count:,} {name} | {seconds:.0f} | {memory:.0f} | {size:.0f} |", flush=True)


if __name__ == "__main__":
    main()
