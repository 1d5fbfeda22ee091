"""What a core does in a second: the figures behind "At 1,000 GPUs" in docs/cluster.md.

    python -m bench.at_scale --root ../shared/data/torchvision

Whole MNIST as 256 grey levels, the shipped network with 32 latent dimensions, one thread, no Ray.
Prints one JSON object; rates are examples in a CPU second, which other work on the machine disturbs
less than the wall clock, unless their name says otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.evaluate import score_split
from pipeline.params import load_params
from pipeline.prepare import prepare
from pipeline.stage import load_split, read_shard, shard_paths
from pipeline.train import build_model
from vae.data import Dataset, statistics_of
from vae.evidence import EvidenceSettings
from vae.models import VAE, VAEConfig
from vae.objectives import Objective
from vae.training import Trainer, TrainingConfig, TrainingState

STEPS = {128: 400, 2048: 30}
SCORED = 100
K = 1000


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """The CPU seconds that it takes, and what it returns."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def training_rate(model: VAE, data: Dataset, batch_size: int) -> float:
    """Images a second of the bare training loop."""
    config = TrainingConfig(batch_size=batch_size)
    trainer = Trainer(model, data, config, Objective(), TrainingState())
    batches = trainer.train_batches(epoch=1)
    trainer.train_step(next(batches), epoch=1, step=0, beta=1.0)
    count = min(STEPS[batch_size], len(data.train) // batch_size - 1)

    def train() -> None:
        for step, batch in zip(range(1, count + 1), batches, strict=False):
            trainer.train_step(batch, epoch=1, step=step, beta=1.0)

    return count * batch_size / seconds(train)[0]


def measure(root: Path, folder: Path) -> dict[str, float]:
    shipped = load_params("params.yaml").data
    chosen = replace(shipped, source="torchvision:MNIST", root=str(root))
    preparing, meta = seconds(lambda: prepare(chosen, folder))
    paths = shard_paths(folder, "train")
    size = sum(path.stat().st_size for path in paths)
    hashing, _ = seconds(lambda: [hashlib.md5(path.read_bytes()).digest() for path in paths])
    parts = (torch.tensor(read_shard(path, meta).x) for path in paths)
    scanning, _ = seconds(lambda: statistics_of(parts, binarize=False))
    splits = {name: torch.tensor(load_split(folder, name).x) for name in ("train", "valid", "test")}
    data = Dataset(train=splits["train"], valid=splits["valid"])
    config = VAEConfig(
        data_shape=meta.data_shape,
        space="grey8",
        latent_dim=32,
        likelihood="discretized_logistic",
    )
    model = build_model(config, data, seed=0)
    rates = {f"train_at_{b}": training_rate(model, data, b) for b in STEPS}
    test = splits["test"][:SCORED]
    settings = EvidenceSettings(num_samples=K, proposal="refined")
    scoring, _ = seconds(lambda: score_split(model.eval(), test, settings))
    return {
        "prepare": sum(meta.counts.values()) / preparing,
        "bytes_per_example": size / meta.counts["train"],
        "md5_megabytes": size / hashing / 1e6,
        "statistics": meta.counts["train"] / scanning,
        **rates,
        "parameters": sum(p.numel() for p in model.parameters()),
        "score_K_1000_refined": SCORED / scoring,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("../shared/data/torchvision"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.root.resolve(), Path(folder) / "prepared")
    print(json.dumps({key: float(f"{value:.3g}") for key, value in found.items()}, indent=1))


if __name__ == "__main__":
    main()
