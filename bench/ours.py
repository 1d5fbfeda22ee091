"""Tightbound, measured as its peers are.

Training is the real stage in a project of its own, so that Ray Train, checkpoints, reports and
MLflow are in the time. log p(x) is a process that estimates it for each line it gets, and prints a
JSON object each time:

    python bench/ours.py DATA --weights FOLDER --images 200 --samples 5000 --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from vae.evidence import importance_sampling
from vae.models import load

REPOSITORY = Path(__file__).parents[1]


@contextmanager
def project(root: Path, *, workers: int = 1, threads: int) -> Iterator[Path]:
    """A project of its own over the MNIST of `root`, ready for `train_stage`.

    workers: of Ray Train, each of so many threads.
    """
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
            "num_workers": workers,
            "threads_per_worker": threads,
            "use_gpu": torch.cuda.is_available(),
        }
        (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        for stage in ("prepare", "selfcheck", "sweep"):
            run_stage(folder, stage)
        yield folder


def run_stage(folder: Path, stage: str) -> None:
    process = stage_process(folder, stage)
    if process.wait():
        raise SystemExit(f"{stage} failed:\n{log_of(folder, stage).read_text()}")


def stage_process(folder: Path, stage: str, *, apart: bool = False) -> subprocess.Popen[bytes]:
    """A stage of dvc.yaml, started; what it says goes to `log_of` it.

    apart: in a session of its own, which Ctrl-C doesn't reach, so that it may be stopped for a
    while: else the kernel hangs a group up that has stopped processes and loses its parent.
    """
    stages = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    with log_of(folder, stage).open("w") as log:
        return subprocess.Popen(
            [sys.executable, *shlex.split(stages[stage]["cmd"])[1:]],
            cwd=folder,
            env={k: v for k, v in os.environ.items() if k != "MLFLOW_TRACKING_URI"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=apart,
        )


def log_of(folder: Path, stage: str) -> Path:
    return folder / f"{stage}.log"


def set_training(folder: Path, *, batch: int, epochs: int) -> None:
    file = folder / "params.yaml"
    params = yaml.safe_load(file.read_text())
    training = params["training"]
    training |= {"epochs": epochs, "batch_size": batch, "patience": None}
    training["seed"] += 1  # a finished run of the same parameters would be taken as it is
    file.write_text(yaml.safe_dump(params, sort_keys=False))


def count_of(folder: Path) -> int:
    """Images of one epoch."""
    return json.loads((folder / "data/prepared/meta.json").read_text())["counts"]["train"]


def train_stage(folder: Path, *, batch: int, epochs: int) -> float:
    """Images a second from the first epoch's end to the last one's, all reporting included."""
    set_training(folder, batch=batch, epochs=epochs)
    run_stage(folder, "train")
    ends = pd.read_csv(folder / "reports/train/history.csv")["time"]
    return count_of(folder) / float(np.diff(ends).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--precision", default="fp32")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = load(given.weights)
    images = np.load(given.data, allow_pickle=False)["test"][: given.images]
    x = torch.from_numpy(images).view(-1, 1, 28, 28)
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "precision": given.precision}
    for _ in sys.stdin:
        start = time.perf_counter()
        log_px = importance_sampling(model, x, given.samples, **options).log_px
        rate = len(x) * given.samples / (time.perf_counter() - start)
        print(json.dumps({"rate": rate, "log_px": log_px.tolist()}), flush=True)


if __name__ == "__main__":
    main()
