"""Training and log p(x) on a GPU beside what a user would pick instead.

    python -m bench.gpu --mnist <folder>

The contenders of bench/peers.py and our own, in turn in one process, the same network, in fp32
unless said; ours in Ray Train too, as the stage that users run, in processes of its own. Needs the
peers (bench/requirements.txt) in our environment. Prints the tables as Markdown. Each training's
first epoch warms up and is not counted; figures are medians of the turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets import MNIST

from bench.network import TABLE_1, arrays_of
from bench.ours import project, train_stage
from bench.peers import EVIDENCE, TRAIN, Epochs
from pipeline.train import build_model
from vae.data import Dataset
from vae.evidence import importance_sampling
from vae.models import VAE
from vae.objectives import Objective
from vae.training import Trainer, TrainingConfig, TrainingState

BATCHES = (128, 512, 2048)
STAGE = "ours, in Ray Train"
STAGE_EPOCHS = {128: 40, 512: 120, 2048: 240}  # some seconds each, so that reports are in the time
EPOCHS = {"ours": 4, "ours, no graphs": 2, "pythae": 2, "lightning": 2, "bare": 3, "products": 2}
SAMPLES = 5000
IMAGES = {"ours": 2000, "ours, bf16": 2000, "pythae": 100, "bare": 500, "products": 2000}


def new_trainer(grey: Tensor, **config: Any) -> Trainer:
    x = grey.view(-1, 1, 28, 28)
    data = Dataset(train=x, valid=x[:1000] // 128, binarize=True)
    model = build_model(TABLE_1, data, seed=0).to(grey.device)
    return Trainer(model, data, TrainingConfig(**config), Objective(), TrainingState())


def train(name: str, grey: Tensor, batch: int, stage: Path) -> float:
    """Images a second."""
    if name == STAGE:
        return train_stage(stage, batch=batch, epochs=STAGE_EPOCHS[batch])
    if name.startswith("ours"):
        trainer = new_trainer(grey, batch_size=batch)
        if name == "ours, no graphs":
            trainer.graphed = None
        seconds = [trainer.epoch().seconds for _ in range(EPOCHS[name])]
        trainer.close()
    else:
        epochs = Epochs(grey.device, EPOCHS[name])
        TRAIN[name](grey.flatten(1), batch, epochs)
        seconds = epochs.seconds
    return len(grey) / statistics.median(seconds[1:])


def estimate(name: str, model: VAE, x: Tensor) -> tuple[float, Tensor]:
    """Images × samples a second, and log p(x) of the first images."""
    x = x[: IMAGES[name]]
    if name.startswith("ours"):
        generator = torch.Generator(x.device).manual_seed(0)
        precision = "bf16" if name.endswith("bf16") else "fp32"
        options = {"generator": generator, "precision": precision}
        run = partial(importance_sampling, model, num_samples=SAMPLES, **options)
        run(x=x[:8])
        torch.cuda.synchronize()
        start = time.perf_counter()
        values = run(x=x).log_px.double().cpu()
    else:
        contender, weights = EVIDENCE[name], arrays_of(model)
        contender(weights, x[:2].float(), SAMPLES, SAMPLES)
        torch.cuda.synchronize()
        start = time.perf_counter()
        found = contender(weights, x.float(), SAMPLES, SAMPLES)
        values = torch.tensor(found, dtype=torch.float64)
    return len(x) * SAMPLES / (time.perf_counter() - start), values


def table(names: list[str], rows: dict[str, dict[str, float]]) -> None:
    print("\n| | " + " | ".join(names) + f" | {names[0]} / pythae | {names[0]} / bare |")
    print("|" + "---|" * (len(names) + 3))
    for label, found in rows.items():
        cells = [f"{found[name]:,.0f}" for name in names]
        cells += [f"{found[names[0]] / found[name]:.2f}" for name in ("pythae", "bare")]
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)


def compare_training(grey: Tensor, repetitions: int, mnist: Path) -> None:
    names = [STAGE, *EPOCHS]
    rates = {str(batch): {name: [] for name in names} for batch in BATCHES}
    with project(mnist, threads=2) as stage:
        for _ in range(repetitions):
            for batch in BATCHES:
                for name in names:
                    rates[str(batch)][name].append(train(name, grey, batch, stage))
    rows = {
        batch: {name: statistics.median(values) for name, values in found.items()}
        for batch, found in rates.items()
    }
    print("\nTraining, images a second, by batch size:")
    table(names, rows)


def compare_evidence(grey: Tensor, test: Tensor, repetitions: int) -> None:
    trainer = new_trainer(grey, batch_size=256, learning_rate=2e-3)
    for _ in range(20):
        trainer.epoch()
    trainer.close()
    draws = torch.Generator(grey.device).manual_seed(0)
    x = torch.bernoulli(test[:, None].float() / 255, generator=draws).to(torch.uint8)
    speeds: dict[str, list[float]] = {name: [] for name in IMAGES}
    values: dict[str, Tensor] = {}
    for _ in range(repetitions):
        for name in IMAGES:
            speed, values[name] = estimate(name, trainer.model, x)
            speeds[name].append(speed)
    print("\nlog p(x), K = 5,000, images × samples a second:")
    table(list(IMAGES), {"": {name: statistics.median(found) for name, found in speeds.items()}})
    for name in ("ours, bf16", "pythae", "bare"):
        difference = values[name] - values["ours"][: len(values[name])]
        error = difference.std() / len(difference) ** 0.5
        print(f"mean log p(x) of {name} minus ours: {difference.mean():+.4f} ± {error:.4f} nats")
    for samples in (100, SAMPLES):
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        log_px = importance_sampling(trainer.model, x, samples).log_px
        print(
            f"all test images, K = {samples}: {log_px.double().mean():.3f}, "
            f"{time.perf_counter() - start:.2f} s, at most "
            f"{torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mnist", type=Path, required=True)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", choices=("evidence", "training"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    grey, test = (
        MNIST(str(given.mnist), train=part, download=True).data.to(device) for part in (True, False)
    )

    if given.only != "evidence":
        compare_training(grey, given.repetitions, given.mnist)
    if given.only != "training":
        compare_evidence(grey, test, given.repetitions)


if __name__ == "__main__":
    main()
