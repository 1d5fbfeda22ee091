"""Seconds and memory as the work grows: bench/growth.csv and bench/growth.png.

    python -m bench.growth

Each point is a process of its own with two threads, so that its peak memory is its own; the least
seconds of three runs in it count. Training is an epoch of random 8-bit images, log p(x) is of 64
of them. A sweep is the real stage, once, with a thread for each trial; its memory is that of all
its processes together.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from bench.stream_memory import peak_memory_mb
from tests.end_to_end.conftest import Project, finish
from vae.data import Dataset
from vae.evidence import importance_sampling
from vae.models import VAE, VAEConfig
from vae.training import TrainingConfig, fit

HERE = Path(__file__).parent
AXES: dict[str, tuple[int, ...]] = {
    "training images": (6_000, 60_000),
    "samples K": (100, 1_000, 10_000),
    "latent dimensions": (8, 32, 128),
    "latent dimensions, refined": (8, 16, 32, 64),
    "pixels": (256, 1024, 4096),
    "trials": (2, 4, 8, 16),
}
REPEATS, THREADS, IMAGES = 3, 2, 64


def digits(count: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 1, side, side)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def model_of(latent_dim: int, side: int) -> VAE:
    torch.manual_seed(0)
    shape = {"data_shape": (1, side, side), "space": "binary", "likelihood": "bernoulli"}
    return VAE(VAEConfig(latent_dim=latent_dim, **shape))


def train(count: int) -> Callable[[], object]:
    images, model = digits(count, 28), model_of(32, 28)
    data = Dataset(train=images, valid=images[:64] // 128, binarize=True)
    config = TrainingConfig(epochs=1, batch_size=512)
    return lambda: next(fit(model, data, config))


def estimate(
    num_samples: int = 1000, *, latent_dim: int = 32, side: int = 28, proposal: str = "encoder"
) -> Callable[[], object]:
    model, x = model_of(latent_dim, side), digits(IMAGES, side) // 128
    return lambda: importance_sampling(model, x, num_samples, proposal=proposal)


WORK: dict[str, Callable[[int], Callable[[], object]]] = {
    "training images": train,
    "samples K": estimate,
    "latent dimensions": lambda size: estimate(latent_dim=size),
    "latent dimensions, refined": lambda size: estimate(latent_dim=size, proposal="refined"),
    "pixels": lambda count: estimate(side=math.isqrt(count)),
}


def measure_here(
    axis: str, size: int, results: multiprocessing.SimpleQueue[dict[str, float]]
) -> None:
    torch.set_num_threads(THREADS)
    work = WORK[axis](size)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    results.put({"seconds": min(seconds), "peak_mb": peak})


def measure(axis: str, size: int) -> dict[str, float]:
    """Seconds and peak memory of one point, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.SimpleQueue[dict[str, float]] = context.SimpleQueue()
    process = context.Process(target=measure_here, args=(axis, size, results))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{axis} {size}: exit code {process.exitcode}")
    return results.get()


def measure_sweep(trials: int) -> dict[str, float]:
    """Of a sweep over so many latent sizes."""
    with tempfile.TemporaryDirectory() as folder:
        project = Project.create(Path(folder))
        project.change(
            {
                "data.limit": 2000,
                "sweep.latent_dim": list(range(2, 2 + trials)),
                "sweep.likelihood": ["discretized_logistic"],
                "sweep.epochs": 20,
            }
        )
        project.stage("prepare")
        project.stage("selfcheck")
        start = time.perf_counter()
        process = project.start(*project.stage_command("sweep"), TIGHTBOUND_VERBOSITY="quiet")
        peak = peak_memory_mb(process)
        finish(process)
        return {"seconds": time.perf_counter() - start, "peak_mb": peak}


def draw(table: pd.DataFrame, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(
        2, len(AXES), figsize=(2.5 * len(AXES), 5), sharex="col", layout="constrained"
    )
    for column, axis in enumerate(AXES):
        points = table[table["axis"] == axis]
        for row, (name, color) in enumerate((("seconds", "#2a6fbb"), ("peak_mb", "#d1622b"))):
            plot = axes[row][column]
            plot.plot(points["size"], points[name], "o-", color=color)
            plot.set(xscale="log", yscale="log", xticks=points["size"])
            plot.set_xticklabels([f"{size:,}" for size in points["size"]])
            plot.minorticks_off()
            if row == 0:
                first = points.iloc[0]
                plot.plot(
                    points["size"],
                    first["seconds"] * points["size"] / first["size"],
                    "--",
                    color="#999",
                    linewidth=1,
                )
                plot.set_title(axis)
            else:
                plot.set_ylim(100, 10_000)
    axes[0][0].set_ylabel("seconds (dashed: linear)")
    axes[1][0].set_ylabel("peak memory, MB")
    figure.savefig(path, dpi=110)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    rows = []
    for axis, sizes in AXES.items():
        for size in sizes:
            found = measure_sweep(size) if axis == "trials" else measure(axis, size)
            rows.append({"axis": axis, "size": size} | found)
            print(f"{axis} {size:,}: {found['seconds']:.2f} s, {found['peak_mb']:,.0f} MB")
    table = pd.DataFrame(rows).round(3)
    table.to_csv(HERE / "growth.csv", index=False)
    draw(table, HERE / "growth.png")


if __name__ == "__main__":
    main()
