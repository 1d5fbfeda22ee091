"""What a tighter log p(x) costs: bench/tightness.png and bench/tightness.csv.

    python -m bench.tightness --mnist <folder>

One model (784-200-200-z50 tanh, Bernoulli, 20 epochs of MNIST), test images, two threads: the mean
estimate, which is a lower bound in expectation, against the seconds that an image takes, by
importance sampling from two proposals and by annealing; and what sampling each image only until
its standard error is reached saves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torchvision.datasets import MNIST

from bench.network import TABLE_1
from pipeline.train import build_model
from vae.data import Dataset
from vae.evidence import Evidence, annealed_importance_sampling, importance_sampling
from vae.models import VAE
from vae.training import TrainingConfig, fit

HERE = Path(__file__).parent
IMAGES, CHAINS, MOST = 50, 8, 5000
ADAPTIVE_IMAGES = 500
CURVES: dict[str, tuple[int, ...]] = {
    "encoder": (100, 1000, 10_000, 100_000),
    "refined": (100, 1000, 10_000),
    "annealed": (20, 100, 500),
}
TARGETS = (0.2, 0.1, 0.05)  # nats
LABELS = {
    "encoder": ("importance sampling from the encoder", "K = {:,}", "#2a6fbb", "o", (8, -12), 0),
    "refined": ("importance sampling, refined proposals", "K = {:,}", "#2f8f5b", "^", (2, 8), 40),
    "annealed": (f"annealed, {CHAINS} chains", "{:,} temperatures", "#d1622b", "s", (4, -24), 0),
}


def trained(root: Path) -> VAE:
    images = MNIST(str(root), train=True, download=True).data[:, None]
    data = Dataset(train=images[1000:], valid=images[:1000], binarize=True)
    model = build_model(TABLE_1, data, seed=0)
    config = TrainingConfig(epochs=20, batch_size=256, learning_rate=2e-3, schedule="cosine")
    for _ in fit(model, data, config):
        pass
    return model


def estimate(name: str, model: VAE, x: torch.Tensor, size: int) -> Evidence:
    generator = torch.Generator().manual_seed(1)
    if name == "annealed":
        return annealed_importance_sampling(
            model, x, CHAINS, num_temperatures=size, generator=generator
        )
    return importance_sampling(model, x, size, proposal=name, generator=generator)


def row_of(name: str, size: float, found: Evidence, seconds: float) -> dict[str, Any]:
    """One line of the table, which is also printed."""
    count = len(found.log_px)
    row = {
        "estimator": name,
        "size": size,
        "images": count,
        "seconds_an_image": seconds / count,
        "passes_an_image": found.samples.double().mean().item(),
        "log_px": found.log_px.mean().item(),
        "se": found.se.square().sum().sqrt().item() / count,
    }
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def curves(model: VAE, x: torch.Tensor) -> Iterator[dict[str, Any]]:
    """Each estimator at each of its sizes."""
    for name, sizes in CURVES.items():
        for size in sizes:
            start = time.perf_counter()
            found = estimate(name, model, x, size)
            yield row_of(name, size, found, time.perf_counter() - start)


def adaptive(model: VAE, x: torch.Tensor) -> Iterator[dict[str, Any]]:
    """K = 5000 for every image, and the same noise until each image's error is reached."""
    for proposal in ("encoder", "refined"):
        for target in (None, *TARGETS):
            generator = torch.Generator().manual_seed(1)
            start = time.perf_counter()
            found = importance_sampling(
                model, x, MOST, proposal=proposal, generator=generator, target_se=target
            )
            seconds = time.perf_counter() - start
            yield row_of(f"adaptive {proposal}", target or 0.0, found, seconds)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name, (label, each, color, marker, beside, rotation) in LABELS.items():
        points = [row for row in rows if row["estimator"] == name]
        x, y = ([row[key] for row in points] for key in ("seconds_an_image", "log_px"))
        axes.errorbar(
            x, y, [row["se"] for row in points], color=color, marker=marker, capsize=2, label=label
        )
        for row in points:
            axes.annotate(
                each.format(row["size"]),
                (row["seconds_an_image"], row["log_px"]),
                xytext=beside,
                textcoords="offset points",
                rotation=rotation,
                fontsize=7,
                color=color,
            )
    axes.set_xscale("log")
    axes.margins(x=0.1, y=0.12)
    axes.set_xlabel("seconds an image, two threads")
    axes.set_ylabel(f"mean log p(x) of {IMAGES} test images, nats")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", type=Path, default=HERE.parent / ".tightbound" / "torchvision")
    given = parser.parse_args()
    torch.set_num_threads(2)
    model = trained(given.mnist)
    test = MNIST(str(given.mnist), train=False, download=True).data[:ADAPTIVE_IMAGES, None]
    x = torch.bernoulli(test / 255, generator=torch.Generator().manual_seed(0))
    importance_sampling(model, x[:2], 100)  # the first call is slow
    rows = [*curves(model, x[:IMAGES]), *adaptive(model, x)]
    pd.DataFrame(rows).to_csv(HERE / "tightness.csv", index=False, float_format="%.5g")
    draw(rows, HERE / "tightness.png")


if __name__ == "__main__":
    main()
