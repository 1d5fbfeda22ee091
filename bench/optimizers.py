"""How good a model is after how many minutes of training: bench/optimizers.csv.

    python -m bench.optimizers --mnist <folder>

784-200-200-z50 tanh, Bernoulli, dynamically binarised MNIST, ELBO, a cosine schedule to zero, one
thread, without Ray. Each point is a training of its own; the two optimisers take turns. Batch size
and learning rate of each are the best of a few tried.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pandas as pd
import torch
from torchvision.datasets import MNIST

from bench.network import TABLE_1
from pipeline.train import build_model
from vae.data import Dataset
from vae.evidence import importance_sampling
from vae.training import TrainingConfig, fit

HERE = Path(__file__).parent
SETTINGS = {
    "adam": {"batch_size": 512, "learning_rate": 0.004},
    "muon": {"batch_size": 1024, "learning_rate": 0.05},
}
EPOCHS = {"adam": (6, 20), "muon": (4, 13)}  # about the same minutes
SAMPLES = 500


def measure(data: Dataset, optimizer: str, epochs: int) -> dict[str, float | str]:
    """Minutes of one training, and the validation images' ELBO and log p(x) after it."""
    model = build_model(TABLE_1, data, seed=0)
    config = TrainingConfig(
        epochs=epochs, optimizer=optimizer, schedule="cosine", **SETTINGS[optimizer]
    )
    start = time.perf_counter()
    *_, last = fit(model, data, config)
    seconds = time.perf_counter() - start
    generator = torch.Generator().manual_seed(0)
    log_px = importance_sampling(model, data.valid.float(), SAMPLES, generator=generator).log_px
    return {
        "optimizer": optimizer,
        "epochs": epochs,
        "minutes": seconds / 60,
        "valid_elbo": last.valid_elbo,
        "valid_log_px": log_px.mean().item(),
        "valid_log_px_se": (log_px.std() / len(log_px) ** 0.5).item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mnist", type=Path, required=True)
    images = MNIST(str(parser.parse_args().mnist), train=True, download=True).data[:, None]
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shuffled = images[torch.randperm(len(images), generator=generator)]
    valid = shuffled[:1000]
    valid = (torch.rand(valid.shape, generator=generator) < valid / 255).to(torch.uint8)
    data = Dataset(train=shuffled[1000:], valid=valid, binarize=True)
    rows = []
    for turn in zip(*EPOCHS.values(), strict=True):
        for optimizer, epochs in zip(EPOCHS, turn, strict=True):
            rows.append(row := measure(data, optimizer, epochs))
            print(row, flush=True)
    pd.DataFrame(rows).round(3).to_csv(HERE / "optimizers.csv", index=False)


if __name__ == "__main__":
    main()
