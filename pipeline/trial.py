"""What runs inside a Ray Tune trial: train at one point of the sweep, then estimate log p(x)."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch

from pipeline.worker import TrainingArrays, TrainingJob, checkpoint_folder, start_or_resume
from vae.data import Dataset
from vae.evidence import importance_sampling
from vae.model import VAE
from vae.training import DivergenceError, fit

CHECKPOINT_SECONDS = 5.0
EVIDENCE_BATCH = 128
TRUSTED_KHAT = 0.7


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
                with checkpoint_folder(model, state) as folder:
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
