"""What runs inside Ray Train's workers; `trial.py` has what runs inside Ray Tune's trials.

Across Ray go configurations, paths and the training array (through the object store), no more.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vae.checkpoint import load_state, save_state
from vae.data import Dataset
from vae.model import VAE, VAEConfig
from vae.objectives import Objective
from vae.training import DivergenceError, TrainingConfig, TrainingState, fit

STATE = "state"


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """A complete description of one training: what, how, and with how many threads."""

    model: VAEConfig
    objective: Objective
    training: TrainingConfig
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class TrainingArrays:
    """The training and validation splits as they travel through Ray's object store."""

    train: np.ndarray
    valid: np.ndarray
    binarize: bool

    @property
    def nbytes(self) -> int:
        return self.train.nbytes + self.valid.nbytes

    def dataset(self) -> Dataset:
        # Copies: what comes out of the object store is read-only, which torch can't express.
        return Dataset(
            train=torch.from_numpy(np.array(self.train)),
            valid=torch.from_numpy(np.array(self.valid)),
            binarize=self.binarize,
        )


def build_model(config: VAEConfig, data: Dataset, seed: int) -> VAE:
    """A new model with seeded weights that starts at the data's mean."""
    torch.manual_seed(seed)
    model = VAE(config)
    model.set_data_statistics(*data.statistics())
    return model


def start_or_resume(
    job: TrainingJob, data: Dataset, device: torch.device, checkpoint: Any
) -> tuple[VAE, TrainingState]:
    """A new model and state, or those of a Ray checkpoint (None: there is none)."""
    model = build_model(job.model, data, job.training.seed).to(device)
    if checkpoint is None:
        return model, TrainingState()
    with checkpoint.as_directory() as folder:
        return model, load_state(model, Path(folder) / STATE)


def train_worker(config: dict[str, Any]) -> None:
    """One Ray Train worker. `config`: `job`, and `arrays`, a reference to `TrainingArrays`.

    Every rank reports every epoch; rank 0 brings the checkpoint. A divergence is reported rather
    than raised, since training again from the last checkpoint would only repeat it.
    """
    import ray
    import ray.train
    from ray.train.torch import get_device

    job: TrainingJob = config["job"]
    torch.set_num_threads(job.threads)
    arrays: ray.ObjectRef[TrainingArrays] = config["arrays"]
    data = ray.get(arrays).dataset()
    device = get_device()
    assert isinstance(device, torch.device)
    model, state = start_or_resume(job, data, device, ray.train.get_checkpoint())
    rank = ray.train.get_context().get_world_rank()
    try:
        for stats in fit(model, data, job.training, state, objective=job.objective):
            with checkpoint_folder(model, state, rank == 0) as folder:
                checkpoint = ray.train.Checkpoint.from_directory(folder) if folder else None
                ray.train.report(stats.to_row(), checkpoint=checkpoint)
    except DivergenceError as divergence:
        ray.train.report({"diverged": str(divergence)})


@contextmanager
def checkpoint_folder(
    model: VAE, state: TrainingState, wanted: bool = True
) -> Iterator[str | None]:
    """A temporary folder with the training state, or None where it isn't wanted."""
    if not wanted:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        save_state(model, state, Path(folder) / STATE)
        yield folder
