"""Annealed importance sampling beside the K = 5,000 of trained models: how far off is the latter?

    python -m bench.annealed --mnist <folder> models/vae [another folder ...]

On the first 100 test images, binarised once, two threads: importance sampling from the encoder, and
annealing from the encoder (8 chains, 100 temperatures). Both are lower bounds in expectation, so
the higher one is the nearer. Prints one JSON object a model.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torchvision.datasets import MNIST

from vae.evidence import annealed_importance_sampling, importance_sampling
from vae.models import load

IMAGES, SAMPLES, CHAINS, TEMPERATURES = 100, 5000, 8, 100


def compare(folder: Path, x: torch.Tensor) -> dict[str, float | str]:
    """Mean log p(x) by both, and the mean gain of annealing with its standard error, nats."""
    model = load(folder)
    sampled = importance_sampling(model, x, SAMPLES, generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    annealed = annealed_importance_sampling(
        model,
        x,
        CHAINS,
        num_temperatures=TEMPERATURES,
        generator=torch.Generator().manual_seed(2),
    )
    seconds = time.perf_counter() - start
    gain = annealed.log_px.double() - sampled.log_px.double()
    return {
        "model": str(folder),
        "importance_sampling": sampled.log_px.double().mean().item(),
        "annealed": annealed.log_px.double().mean().item(),
        "gain": gain.mean().item(),
        "gain_se": gain.std().item() / len(gain) ** 0.5,
        "annealed_seconds_an_image": seconds / len(x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--mnist", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(2)
    grey = MNIST(str(given.mnist), train=False, download=True).data[:IMAGES, None]
    x = torch.bernoulli(grey / 255, generator=torch.Generator().manual_seed(0))
    for folder in given.models:
        print(json.dumps(compare(folder, x)), flush=True)


if __name__ == "__main__":
    main()
