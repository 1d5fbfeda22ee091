"""Train stage: Ray Train, data-parallel, on the configuration that the sweep chose.

Reads data/prepared and reports/sweep/best.json. Writes models/vae (the weights of the epoch with
the best validation bound), and reports/train: history.csv, metrics.json, run.json. Killed and
started again, it goes on from its last epoch.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.cluster import connect as cluster, fault_of_a_worker, require_shared, runs
from pipeline.params import Params, in_words, load_params
from pipeline.stage import (
    UserError,
    duration,
    load_meta,
    read_json,
    run_stage,
    say,
    steps,
    write_json,
)
from pipeline.tracking import live as live_tracking, mirror as tracking
from pipeline.train.streaming import Stream, load_training
from pipeline.train.worker import STATE, TrainingArrays, TrainingJob, train_worker
from vae.models import VAE, VAEConfig, save
from vae.objectives import Objective
from vae.system import whole_directory
from vae.training import TrainingConfig, TrainingState, load_state

KEPT_CHECKPOINTS = 2
LESS_MEMORY = "training.batch_size, scaling.num_workers or training.memory_limit_mb"
# Until a group of workers whose node has gone is given up for a smaller one.
START_VARIABLE, ELASTIC_START_SECONDS = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10"
# Between looks for room for more workers; taking them in starts the group anew.
RESIZE_SECONDS = 20.0


def train(params: Params, prepared: Path, best: Path, model_out: Path, out: Path) -> None:
    """Train the chosen configuration, or go on with an interrupted run, and write its results."""
    meta = load_meta(prepared)
    chosen = read_json(best)
    job = TrainingJob(
        model=VAEConfig.from_dict(chosen["model"]),
        objective=Objective(**chosen["objective"]),
        training=chosen_training(params.training, chosen.get("training", {})),
        threads=params.scaling.threads_per_worker,
    )
    content = {
        "model": job.model.to_dict(),
        "objective": asdict(job.objective),
        "training": asdict(job.training),
        "data": meta.hash,
    }
    content_hash = runs.stage_hash("train", content)
    facts = runs.run_facts("train", content_hash, meta.hash, content)
    workers = params.scaling.num_workers
    say(
        f"train      {job.model.likelihood}, {job.model.latent_dim} latent dimensions, on "
        f"{workers} worker{'s' if workers > 1 else ''}, at most {job.training.epochs} epochs"
    )
    with live_tracking.live_run(params, facts) as live:
        data = load_training(prepared, meta, params.training.memory_limit_mb)
        model, state = run_workers(params, job, data, content_hash, live.log_epoch)
    history = pd.DataFrame([stats.to_row() for stats in state.history])
    with whole_directory(out) as fresh:
        history.to_csv(fresh / "history.csv", index=False)
        write_json(fresh / "metrics.json", summary(history, params))
        write_json(fresh / "run.json", facts | {"finished": time.time()})
    model.load_state_dict(state.best_weights)
    save(model, model_out)
    kept = summary(history, params)
    say(
        f"train      {kept['epochs']} epochs in {duration(kept['seconds'])}; kept: epoch "
        f"{kept['best_epoch']}, validation ELBO {kept['valid_elbo']:.2f} nats"
    )
    tracking.mirror_training(params, out, model_out, best.parent)


def chosen_training(own: TrainingConfig, swept: dict[str, Any]) -> TrainingConfig:
    """`training` of params.yaml, with the values of the keys that the sweep chose."""
    for key, value in swept.items():
        if value != getattr(own, key):
            mine = in_words(getattr(own, key))
            say(f"train      {key} {in_words(value)} from the sweep, not {mine} as in params.yaml")
    return replace(own, **swept)


def run_workers(
    params: Params,
    job: TrainingJob,
    data: TrainingArrays | Stream,
    content_hash: str,
    on_epoch: Callable[[dict[str, Any]], None],
) -> tuple[VAE, TrainingState]:
    """Train under Ray Train; returns the model and its state after the last epoch.

    on_epoch: gets each finished epoch's row of history.csv, within a second or so.
    """
    scaling = params.scaling
    with (
        runs.claim("train", content_hash, scaling.storage) as run,
        cluster.connect(
            object_store_bytes=cluster.store_size(data.nbytes), needs="pipeline.train.local_trainer"
        ),
    ):
        from ray.exceptions import RayError
        from ray.train import TrainingFailedError

        from pipeline.train.progress import EpochLines, follow

        cluster.require(
            scaling.threads_per_worker,
            1 if scaling.use_gpu else 0,
            workers=scaling.fewest_workers,
            key="scaling.num_workers (or min_workers, threads_per_worker, use_gpu)",
        )
        require_shared(run.storage, key="scaling.storage")
        waits = scaling.elastic or cluster.autoscales()
        if scaling.elastic:
            os.environ.setdefault(START_VARIABLE, ELASTIC_START_SECONDS)
        log = run.folder / "epochs.jsonl"
        trainer = _trainer(params, job, data, run, log, waits)
        lines = EpochLines(on_epoch)
        with steps("train", job.training.epochs, "epoch", done=None), follow(log, lines.show):
            try:
                result = trainer.fit()
            except SystemExit as stopped:  # Ray Train's answer to Ctrl-C
                raise KeyboardInterrupt from stopped
            except (TrainingFailedError, RayError) as error:
                raise _told(error, run.address) from error
    if lines.diverged:
        raise UserError(f"{lines.diverged} (the last good epoch is kept in {run.address})")
    if result.checkpoint is None:
        raise UserError("training ended without a finished epoch")
    model = VAE(job.model)
    with result.checkpoint.as_directory() as saved:
        return model, load_state(model, Path(saved) / STATE)


def _trainer(
    params: Params,
    job: TrainingJob,
    data: TrainingArrays | Stream,
    run: runs.Run,
    log: Path,
    waits: bool,
) -> Any:
    """Ray's trainer. log: where each epoch is noted; waits: for nodes that are to come."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipeline.train.local_trainer import trainer_class
    from pipeline.train.progress import EpochLog
    from pipeline.train.ray_data import EveryRow

    scaling = params.scaling
    lean = not (scaling.elastic or cluster.address())
    return (trainer_class() if lean else TorchTrainer)(
        train_worker,
        train_loop_config={"job": job, "data": ray.put(data)},
        datasets=data.ray_datasets(scaling.num_workers, job.training.seed),
        dataset_config=EveryRow(),
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(scaling.fewest_workers, scaling.num_workers)
            if scaling.elastic
            else scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": scaling.threads_per_worker},
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        ),
        run_config=RunConfig(
            name=run.name,
            storage_path=run.storage,
            callbacks=[EpochLog(log)],
            failure_config=FailureConfig(
                max_failures=scaling.max_failures,
                # A node that went, or is not there yet, shows as a group that doesn't start.
                controller_failure_limit=-1 if waits else 1,
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
        ),
    )


def _told(error: Exception, storage: str) -> Exception:
    """Ray Train's failure as a sentence, where there is one for it."""
    from ray.train import TrainingFailedError

    fault = fault_of_a_worker(f"{type(error).__name__}: {error}", key=LESS_MEMORY, storage=storage)
    if fault is None:
        return error
    who = "the process of Ray Train that watches the workers failed"
    if isinstance(error, TrainingFailedError):
        who = "a training worker failed more often than scaling.max_failures allows"
    return UserError(f"{who}: {fault}; the same command goes on from the last epoch")


def summary(history: pd.DataFrame, params: Params) -> dict[str, Any]:
    """metrics.json: the best epoch's figures on the validation split, and the run's speed."""
    best = history.loc[history["valid_bound"].idxmax()]
    return {
        "epochs": len(history),
        "best_epoch": int(best["epoch"]),
        "valid_elbo": float(best["valid_elbo"]),
        "valid_log_px_z": float(best["valid_log_px_z"]),
        "valid_kl": float(best["valid_kl"]),
        "seconds": float(history["seconds"].to_numpy().sum()),
        "images_per_s": float(np.median(history["images_per_s"])),
        "num_workers": params.scaling.num_workers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--sweep", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    paths = parser.parse_args()
    train(load_params(), paths.prepared, paths.sweep / "best.json", paths.model, paths.train)


if __name__ == "__main__":
    run_stage(main)
