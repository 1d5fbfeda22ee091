"""Tightbound, measured as its peers are: the last line printed is a JSON object.

    python bench/ours.py train ROOT --batch 128 --epochs 8 --threads 2
    python bench/ours.py evidence DATA --weights FOLDER --images 200 --samples 5000 --threads 2

`train` runs the real stages in a project of its own, so that Ray Train, checkpoints, reports and
MLflow are in the time; ROOT is what torchvision.datasets.MNIST takes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from vae import load
from vae.evidence import importance_sampling

REPOSITORY = Path(__file__).parents[1]


@contextmanager
def project(root: Path, *, threads: int) -> Iterator[Path]:
    """A project of its own over the MNIST of `root`, ready for `train_stage`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("vae", "pipeline"):
            shutil.copytree(REPOSITORY / part, folder / part)
        shutil.copy(REPOSITORY / "dvc.yaml", folder)
        params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
        params["data"] |= {
            "source": "torchvision:MNIST",
            "root": str(root.resolve()),
            "space": "binary",
            "valid_fraction": 0.002,
        }
        params["model"] |= {"latent_dim": 50, "likelihood": "bernoulli", "hidden": [200, 200]}
        params["scaling"] |= {
            "num_workers": 1,
            "threads_per_worker": threads,
            "use_gpu": torch.cuda.is_available(),
        }
        (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        for stage in ("prepare", "selfcheck", "sweep"):
            run_stage(folder, stage)
        yield folder


def run_stage(folder: Path, stage: str) -> None:
    stages = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    command = [sys.executable, *shlex.split(stages[stage]["cmd"])[1:]]
    environment = {k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{stage} failed:\n{done.stdout}{done.stderr}")


def train_stage(folder: Path, *, batch: int, epochs: int) -> dict[str, Any]:
    """Images a second from the end of one epoch to the end of the next, all reporting included."""
    file = folder / "params.yaml"
    params = yaml.safe_load(file.read_text())
    training = params["training"]
    training |= {"epochs": epochs, "batch_size": batch, "patience": None}
    training["seed"] += 1  # a finished run of the same parameters would be taken as it is
    file.write_text(yaml.safe_dump(params, sort_keys=False))
    run_stage(folder, "train")
    history = pd.read_csv(folder / "reports/train/history.csv")
    count = json.loads((folder / "data/prepared/meta.json").read_text())["counts"]["train"]
    between = history["time"].diff().dropna()
    return {
        "images_per_s": count / statistics.median(between),
        "images_per_s_mean": count / statistics.mean(between),
        "images_per_s_in_steps": statistics.median(history["images_per_s"][1:]),
    }


def evidence(
    data: Path, weights: Path, *, images: int, samples: int, precision: str
) -> dict[str, Any]:
    """log p(x) by importance sampling from the encoder, as the peers estimate it."""
    model = load(weights)
    x = torch.from_numpy(np.load(data, allow_pickle=False)["test"][:images]).view(-1, 1, 28, 28)
    generator = torch.Generator().manual_seed(0)
    importance_sampling(model, x[:1], 100, generator=generator, precision=precision)
    start = time.perf_counter()
    log_px = importance_sampling(model, x, samples, generator=generator, precision=precision).log_px
    rate = len(x) * samples / (time.perf_counter() - start)
    return {"samples_per_s": rate, "log_px": log_px.tolist()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("train", "evidence"))
    parser.add_argument("data", type=Path)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", type=int)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--precision", default="fp32")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.task == "train":
        with project(given.data, threads=given.threads) as folder:
            result = train_stage(folder, batch=given.batch, epochs=given.epochs)
    else:
        result = evidence(
            given.data,
            given.weights,
            images=given.images,
            samples=given.samples,
            precision=given.precision,
        )
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(result))


if __name__ == "__main__":
    main()
