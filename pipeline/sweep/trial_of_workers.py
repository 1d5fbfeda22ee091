"""What runs inside a Ray Tune trial of several workers: a Ray Train run of its own.

The trial itself takes no CPU, so that its workers find theirs; that there are enough of them for
all trials at a time is seen to before (`trials.py`), since those that wait for each other's would
wait for ever.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.sweep.search import LOWEST, SCORE
from pipeline.sweep.trial import Setting, final_result
from pipeline.train import STATE, TrainingArrays, TrainingJob, train_worker
from vae.models import VAE
from vae.training import load_state

KEPT_CHECKPOINTS = 2
NO_CPU = {"cpu": 0.0, "gpu": 0.0, "memory": 1.0}  # Tune must be asked for something


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The workers of each trial; storage: where their runs lie, a folder or s3://…."""

    count: int
    use_gpu: bool
    max_failures: int
    storage: str


def tune_workers(
    config: dict[str, Any], *, setting: Setting, workers: Workers, arrays: list[Any]
) -> None:
    """One Ray Tune trial of several workers; killed and started again, it goes on.

    config: as `Space.trial` reads it; arrays: one reference to `TrainingArrays`. Reports what
    `tune_trial` reports, but no epochs: a scheduler could not stop the workers.
    """
    import ray
    from ray import tune

    from pipeline.train import EpochLog, follow

    if (begun := setting.begin(config)) is None:
        return
    name, job = begun
    diverged: dict[str, Any] = {}
    last = 0

    def show(row: dict[str, Any]) -> None:
        nonlocal last
        if "diverged" in row:
            diverged.update(row)
            return
        last = row["epoch"]

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "epochs.jsonl"
        with follow(log, show):
            result = _trainer(job, workers, arrays, name, EpochLog(log)).fit()
    if diverged:
        tune.report(diverged | {"epoch": last, SCORE: LOWEST})
        return
    evidence = ray.remote(num_cpus=job.threads, num_gpus=int(workers.use_gpu), max_retries=3)(
        nested_result
    )
    # Not within the trial's own place, which has no CPU.
    task = evidence.options(scheduling_strategy="DEFAULT").remote(
        job, result.checkpoint, arrays, setting.num_importance_samples, workers.use_gpu
    )
    tune.report(ray.get(task))


def _trainer(job: TrainingJob, workers: Workers, arrays: list[Any], name: str, log: Any) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job, "data": arrays[0]},
        torch_config=TorchConfig(backend="nccl" if workers.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.use_gpu,
            resources_per_worker={"CPU": job.threads},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=workers.storage,
            callbacks=[log],
            failure_config=FailureConfig(
                max_failures=workers.max_failures, controller_failure_limit=1
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
        ),
    )


def nested_result(
    job: TrainingJob, checkpoint: Any, arrays: list[Any], num_samples: int, use_gpu: bool
) -> dict[str, Any]:
    """The figures of a finished run, from its last checkpoint."""
    import ray

    torch.set_num_threads(job.threads)
    found: TrainingArrays = ray.get(arrays[0])
    model = VAE(job.model).to("cuda" if use_gpu else "cpu")
    with checkpoint.as_directory() as folder:
        state = load_state(model, Path(folder) / STATE)
    return final_result(model, state, found.dataset(), num_samples, job.training.seed)
