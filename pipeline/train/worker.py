"""What runs inside Ray Train's workers; `trial.py` has what runs inside Ray Tune's trials.

Across Ray go configurations, paths and the training array (through the object store), no more.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.stage import Meta, UserError, load_split, training_mb
from vae.data import Dataset, Source
from vae.models import VAE, VAEConfig
from vae.objectives import Objective
from vae.training import DivergenceError, TrainingConfig, TrainingState, fit, load_state, save_state

STATE = "state"
REPORT_SECONDS = 1.0


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

    def ray_datasets(self, num_workers: int, seed: int) -> dict[str, Any]:
        """Nothing goes through Ray Data."""
        return {}


def load_arrays(prepared: Path, meta: Meta, *, limit_mb: int | None = None) -> TrainingArrays:
    """The prepared training and validation arrays.

    Raises UserError where the training array exceeds `training.memory_limit_mb`.
    """
    if limit_mb is not None and training_mb(meta) > limit_mb:
        raise UserError(
            f"the sweep's trials hold the training data in memory: {training_mb(meta):.0f} MB, and "
            f"training.memory_limit_mb is {limit_mb}; pin model.latent_dim and model.likelihood "
            "(training itself streams), or sweep on less data (data.limit)"
        )
    return TrainingArrays(
        train=load_split(prepared, "train").x,
        valid=load_split(prepared, "valid").x,
        binarize=meta.grey_binarized,
    )


def build_model(config: VAEConfig, data: Source, seed: int) -> VAE:
    """A new model with seeded weights that starts at the data's mean."""
    torch.manual_seed(seed)
    model = VAE(config)
    model.set_data_statistics(*data.statistics())
    return model


def start_or_resume(
    job: TrainingJob, data: Source, device: torch.device, checkpoint: Any
) -> tuple[VAE, TrainingState]:
    """A new model and state, or those of a Ray checkpoint (None: there is none)."""
    model = build_model(job.model, data, job.training.seed).to(device)
    if checkpoint is None:
        return model, TrainingState()
    with checkpoint.as_directory() as folder:
        return model, load_state(model, Path(folder) / STATE)


def train_worker(config: dict[str, Any]) -> None:
    """One Ray Train worker. `config`: `job`, and `data`, a reference to arrays or a stream.

    About once a second every rank reports the epochs since; rank 0 brings the checkpoint. A
    divergence is reported rather than raised, since training again from the last checkpoint would
    only repeat it.
    """
    import ray
    import ray.train
    from ray.train.torch import get_device

    job: TrainingJob = config["job"]
    torch.set_num_threads(job.threads)
    given: ray.ObjectRef[Any] = config["data"]
    data: Source = ray.get(given).dataset()
    device = get_device()
    assert isinstance(device, torch.device)
    model, state = start_or_resume(job, data, device, ray.train.get_checkpoint())
    rank = ray.train.get_context().get_world_rank()
    epochs: list[dict[str, Any]] = []
    last = -math.inf
    try:
        for stats in fit(model, data, job.training, state, objective=job.objective):
            epochs.append(stats.to_row())
            due = time.monotonic() - last > REPORT_SECONDS or state.finished(job.training)
            if not _as_rank_zero(due, device):
                continue
            with checkpoint_folder(model, state, rank == 0) as folder:
                checkpoint = ray.train.Checkpoint.from_directory(folder) if folder else None
                ray.train.report({"epochs": epochs}, checkpoint=checkpoint)
            epochs, last = [], time.monotonic()
    except DivergenceError as divergence:
        ray.train.report({"diverged": str(divergence)})


def _as_rank_zero(decision: bool, device: torch.device) -> bool:
    """Rank 0's decision, on every rank."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return decision
    decided = torch.tensor([decision], dtype=torch.uint8, device=device)
    dist.broadcast(decided, src=0)
    return bool(decided.item())


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
