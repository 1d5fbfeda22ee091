"""What runs inside a Ray Tune trial: train at one point of the sweep, then estimate log p(x)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.sweep.journal import job_at, trial_id
from pipeline.sweep.search import LOWEST, SCORE, Space
from pipeline.train import TrainingArrays, TrainingJob, checkpoint_folder, start_or_resume
from vae.data import Dataset
from vae.evidence import importance_sampling
from vae.models import VAE
from vae.training import DivergenceError, TrainingState, fit
from vae.trust import KHAT_LIMIT

CHECKPOINT_SECONDS = 5.0
EVIDENCE_BATCH = 128
REPLAYED = "replayed"  # in the result of a trial that was finished before


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all trials of a sweep share.

    every_epoch: report each epoch, as a scheduler needs it, rather than a checkpoint every few
    seconds. finished, checkpoints: results and places of earlier trials, by id.
    """

    job: TrainingJob
    space: Space
    num_importance_samples: int
    every_epoch: bool
    use_gpu: bool
    finished: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    checkpoints: Mapping[str, str] = field(default_factory=dict)

    def begin(self, config: Mapping[str, Any]) -> tuple[str, TrainingJob] | None:
        """A trial's id and job; None for one that was finished before, whose result is reported."""
        from ray import tune

        trial = self.space.trial(config)
        name = trial_id(self.job, trial)
        if name not in self.finished:
            return name, job_at(self.job, trial)
        tune.report({**self.finished[name], REPLAYED: True})
        return None


def tune_trial(config: dict[str, Any], *, setting: Setting, arrays: TrainingArrays) -> None:
    """One Ray Tune trial.

    config: as `Space.trial` reads it. A divergence is reported rather than raised, since training
    again would only repeat it.
    """
    from ray import tune

    if (begun := setting.begin(config)) is None:
        return
    name, job = begun
    torch.set_num_threads(job.threads)
    checkpoint = tune.get_checkpoint()
    if checkpoint is None and name in setting.checkpoints:
        checkpoint = tune.Checkpoint(setting.checkpoints[name])
    data = arrays.dataset()
    device = torch.device("cuda" if setting.use_gpu else "cpu")
    model, state = start_or_resume(job, data, device, checkpoint)
    try:
        _train(job, model, state, data, setting.every_epoch)
    except DivergenceError as divergence:
        tune.report({"diverged": str(divergence), "epoch": state.epoch, SCORE: LOWEST})
        return
    tune.report(final_result(model, state, data, setting.num_importance_samples, job.training.seed))


def _train(
    job: TrainingJob, model: VAE, state: TrainingState, data: Dataset, every_epoch: bool
) -> None:
    """Train to the end, reporting checkpoints on the way."""
    from ray import tune

    saved = time.monotonic()
    for stats in fit(model, data, job.training, state, objective=job.objective):
        finished = state.finished(job.training)
        if every_epoch and finished:
            return  # the result follows; the scheduler would take this report for it
        if every_epoch or finished or time.monotonic() - saved > CHECKPOINT_SECONDS:
            with checkpoint_folder(model, state) as folder:
                assert folder is not None
                # The bound stands in for log p(x) where a scheduler stops the trial here.
                report = stats.to_row() | {SCORE: stats.valid_elbo}
                tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))
            saved = time.monotonic()


def final_result(
    model: VAE, state: TrainingState, data: Dataset, num_samples: int, seed: int
) -> dict[str, Any]:
    """A finished training's figures at its best epoch, whose weights `model` takes.

    fit_seconds: of all its epochs, whenever they were trained, and of the estimate.
    """
    start = time.monotonic()
    model.load_state_dict(state.best_weights)
    evidence = valid_evidence(model, data, num_samples, seed)
    best = state.history[state.best_epoch - 1].to_row() | {"epoch": state.epoch}
    trained = sum(stats.seconds for stats in state.history)
    seconds = trained + time.monotonic() - start
    return best | evidence | {SCORE: evidence["valid_log_px"], "fit_seconds": seconds}


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
        "khat_bad_fraction": (khat > KHAT_LIMIT).double().mean().item(),
        "num_samples": num_samples,
    }
