"""What runs inside Ray: one training function, under Ray Train workers and Ray Tune trials alike.

Across Ray go configurations, paths and the training array (through the object store), no more.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vae.checkpoint import load_state, save_state
from vae.data import Dataset
from vae.evidence import importance_sampling
from vae.model import VAE, VAEConfig
from vae.objectives import Objective
from vae.training import DivergenceError, TrainingConfig, TrainingState, fit

STATE = "state"
CHECKPOINT_SECONDS = 5.0
EVIDENCE_BATCH = 128
TRUSTED_KHAT = 0.7


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
            with _checkpoint(model, state, rank == 0) as folder:
                checkpoint = ray.train.Checkpoint.from_directory(folder) if folder else None
                ray.train.report(stats.to_row(), checkpoint=checkpoint)
    except DivergenceError as divergence:
        ray.train.report({"diverged": str(divergence)})


def tune_trial(
    config: dict[str, Any],
    *,
    job: TrainingJob,
    arrays: TrainingArrays,
    num_importance_samples: int,
    every_epoch: bool,
) -> None:
    """One Ray Tune trial: train `job` at a point, then estimate log p(x) on the validation split.

    config: `point`, the swept keys of the model's configuration. every_epoch: report each epoch
    (a scheduler needs that) rather than a checkpoint every few seconds.
    A divergence is reported rather than raised, as by `train_worker`.
    """
    from ray import tune

    torch.set_num_threads(job.threads)
    job = replace(job, model=replace(job.model, **config["point"]))
    data = arrays.dataset()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, state = start_or_resume(job, data, device, tune.get_checkpoint())
    start = saved = time.monotonic()
    try:
        for stats in fit(model, data, job.training, state, objective=job.objective):
            if every_epoch or time.monotonic() - saved > CHECKPOINT_SECONDS:
                with _checkpoint(model, state) as folder:
                    assert folder is not None
                    checkpoint = tune.Checkpoint.from_directory(folder)
                    tune.report(stats.to_row(), checkpoint=checkpoint)
                saved = time.monotonic()
    except DivergenceError as divergence:
        tune.report({"diverged": str(divergence)})
        return
    model.load_state_dict(state.best_weights)
    result = valid_evidence(model, data, num_importance_samples, job.training.seed)
    best = state.history[state.best_epoch - 1].to_row() | {"epoch": state.epoch}
    tune.report(best | result | {"fit_seconds": time.monotonic() - start})


def valid_evidence(model: VAE, data: Dataset, num_samples: int, seed: int) -> dict[str, float]:
    """The validation split's importance-sampled log p(x), with its standard error.

    Nats, means over images; `valid_log_px_se` is the error across images. The proposal is
    Laplace's, fitted to each image: what the encoder misses would else be counted against the
    likelihood that suffers most from it.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    parts = [
        importance_sampling(
            model, x.to(device), num_samples, generator=generator, proposal="laplace"
        )
        for x in data.valid.split(EVIDENCE_BATCH)
    ]
    log_px = torch.cat([part.log_px for part in parts]).double()
    khat = torch.cat([part.khat for part in parts])
    return {
        "valid_log_px": log_px.mean().item(),
        "valid_log_px_se": (log_px.std() / math.sqrt(len(log_px))).item(),
        "khat_bad_fraction": (khat > TRUSTED_KHAT).double().mean().item(),
        "num_samples": num_samples,
    }


@contextmanager
def _checkpoint(model: VAE, state: TrainingState, wanted: bool = True) -> Iterator[str | None]:
    """A temporary folder with the training state, or None where it isn't wanted."""
    if not wanted:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        save_state(model, state, Path(folder) / STATE)
        yield folder
