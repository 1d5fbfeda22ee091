"""Sweep stage: Ray Tune over latent dimension and likelihood.

Reads data/prepared and selfcheck.json (which must have passed). Writes reports/sweep:
trials.csv, best.json (a complete model and objective), sweep.png, run.json.

Trials are ranked by the importance-sampled log-likelihood of the validation split in the space's
common unit (bits/dim for discrete data), so that all likelihoods compete fairly; never by a raw
density and never by a bound that differs between likelihoods.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline import cluster, runs, tracking
from pipeline.params import Params, load_params
from pipeline.plots import sweep_plot
from pipeline.prepared import Meta, load_meta, load_split
from pipeline.stage import UserError, read_json, run_stage, say, whole_directory, write_json
from pipeline.storage import require_shared
from pipeline.terminal import steps
from pipeline.trial import tune_trial
from pipeline.worker import TrainingArrays, TrainingJob
from vae.model import VAEConfig

COLUMNS = [
    "trial_id",
    "latent_dim",
    "likelihood",
    "seed",
    "status",
    "error",
    "epochs",
    "valid_elbo",
    "valid_log_px",
    "valid_log_px_se",
    "valid_bits_per_dim",
    "valid_bits_per_dim_se",
    "khat_bad_fraction",
    "num_samples",
    "seconds",
]


@dataclass(frozen=True)
class Axes:
    """The swept values; an axis that params.model pins has one."""

    latent_dim: list[int | tuple[int, ...]]
    likelihood: list[str]

    @classmethod
    def of(cls, params: Params) -> Axes:
        model, sweep = params.model, params.sweep
        return cls(
            latent_dim=list(sweep.latent_dim) if model.latent_dim is None else [model.latent_dim],
            likelihood=list(sweep.likelihood) if model.likelihood is None else [model.likelihood],
        )

    def points(self) -> list[dict[str, Any]]:
        pairs = itertools.product(self.latent_dim, self.likelihood)
        return [{"latent_dim": size, "likelihood": name} for size, name in pairs]


def load_arrays(prepared: Path, meta: Meta) -> TrainingArrays:
    """The prepared training and validation arrays."""
    return TrainingArrays(
        train=load_split(prepared, "train").x,
        valid=load_split(prepared, "valid").x,
        binarize=meta.space == "binary" and meta.binarization == "dynamic",
    )


def model_config(params: Params, meta: Meta, point: dict[str, Any]) -> VAEConfig:
    """The complete model at one point of the sweep."""
    fixed = {k: v for k, v in asdict(params.model).items() if k not in ("latent_dim", "likelihood")}
    return VAEConfig(data_shape=meta.data_shape, space=meta.space, **fixed, **point)


def sweep(params: Params, prepared: Path, out: Path) -> None:
    """Run the sweep, or go on with an interrupted one, and write its results to `out`."""
    meta = load_meta(prepared)
    points = Axes.of(params).points()
    training = replace(
        params.training, epochs=params.sweep.epochs, seed=params.sweep.seed, patience=None
    )
    job = TrainingJob(
        model=model_config(params, meta, points[0]),
        objective=params.objective,
        training=training,
        threads=params.scaling.threads_per_worker,
    )
    content = {
        "points": points,
        "model": job.model.to_dict(),
        "objective": asdict(job.objective),
        "training": asdict(job.training),
        "scheduler": params.sweep.scheduler,
        "num_importance_samples": params.sweep.num_importance_samples,
        "data": meta.hash,
    }
    content_hash = runs.stage_hash("sweep", content)
    facts = runs.run_facts("sweep", content_hash, meta.hash, content)
    if len(points) == 1:
        say(f"sweep      one point, nothing to train: {describe(points[0])} (pinned in `model`)")
        rows = [{"trial_id": "pinned", "status": "pinned", **points[0]}]
    else:
        say(
            f"sweep      which likelihood and how many latent dimensions? {len(points)} trials of "
            f"{training.epochs} epochs"
        )
        rows = run_trials(params, job, points, load_arrays(prepared, meta), content_hash)
    trials = to_frame(rows, meta, training.seed)
    best = choose(trials)
    if len(points) > 1:
        say(f"sweep      chosen: {describe(best)}, {score_of(best)} on the validation split")
    with whole_directory(out) as fresh:
        trials.to_csv(fresh / "trials.csv", index=False)
        write_json(fresh / "best.json", best_config(job, best, meta))
        sweep_plot(trials, fresh / "sweep.png")
        write_json(fresh / "run.json", facts | {"finished": time.time()})
    tracking.mirror_sweep(params, out)


def run_trials(
    params: Params,
    job: TrainingJob,
    points: list[dict[str, Any]],
    arrays: TrainingArrays,
    content_hash: str,
) -> list[dict[str, Any]]:
    """Train every point under Ray Tune; one row for each, failed ones with their error."""
    gpus = 1 if params.scaling.use_gpu else 0
    with (
        runs.claim("sweep", content_hash, params.scaling.storage) as run,
        cluster.connect(object_store_bytes=cluster.store_size(arrays.nbytes)),
    ):
        from ray import tune

        from pipeline.progress import TrialProgress

        cluster.require(job.threads, gpus, key="scaling.threads_per_worker (or scaling.use_gpu)")
        require_shared(run.storage, key="scaling.storage")
        trainable = tune.with_resources(
            tune.with_parameters(
                tune_trial,
                job=job,
                arrays=arrays,
                num_importance_samples=params.sweep.num_importance_samples,
                every_epoch=params.sweep.scheduler == "asha",
            ),
            {"cpu": job.threads, "gpu": gpus},
        )
        if tune.Tuner.can_restore(run.address):
            say("sweep      goes on with the trials that are finished")
            tuner = tune.Tuner.restore(
                run.address, trainable, resume_unfinished=True, restart_errored=True
            )
        else:
            tuner = tune.Tuner(
                trainable,
                param_space={"point": tune.grid_search(points)},
                tune_config=tune.TuneConfig(
                    scheduler=_scheduler(params),
                    max_concurrent_trials=params.sweep.max_concurrent,
                    reuse_actors=True,
                    trial_name_creator=lambda trial: f"trial_{trial.trial_id}",
                    trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
                ),
                run_config=tune.RunConfig(
                    failure_config=tune.FailureConfig(max_failures=params.scaling.max_failures),
                    name=run.name,
                    storage_path=run.storage,
                    verbose=0,
                    callbacks=[TrialProgress(job.model)],
                ),
            )
        with steps("sweep", len(points), "trial", lines=len(points)):
            return [_row(result) for result in tuner.fit()]


def _scheduler(params: Params) -> Any:
    """None, or ASHA, whose result depends on the order in which trials report."""
    if params.sweep.scheduler != "asha":
        return None
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(
        time_attr="epoch", metric="valid_elbo", mode="max", max_t=params.sweep.epochs
    )


def _row(result: Any) -> dict[str, Any]:
    """A Tune result as a row of trials.csv."""
    metrics = result.metrics or {}
    row = {
        "trial_id": metrics.get("trial_id") or Path(result.path).name.removeprefix("trial_"),
        "status": "ok",
        **result.config["point"],
        **{key: metrics[key] for key in COLUMNS if key in metrics},
        "epochs": metrics.get("epoch"),
        "seconds": metrics.get("fit_seconds"),
    }
    if result.error is not None:
        return row | {"status": "failed", "error": reason(result.error)}
    if "diverged" in metrics:
        return row | {"status": "failed", "error": metrics["diverged"]}
    if "valid_log_px" not in metrics:
        return row | {"status": "stopped", "error": "stopped early by the scheduler"}
    return row


def reason(error: BaseException) -> str:
    """The one line of a trial's error that tells a person what went wrong."""
    cause = getattr(error, "cause", None) or error
    return str(cause).strip().splitlines()[-1]


def to_frame(rows: list[dict[str, Any]], meta: Meta, seed: int) -> pd.DataFrame:
    """Rows as trials.csv holds them: every column, in the common unit, in the sweep's order."""
    frame = pd.DataFrame(rows).reindex(columns=COLUMNS)
    frame["seed"] = seed
    dims = math.prod(meta.data_shape)
    if meta.space != "continuous":
        frame["valid_bits_per_dim"] = -frame["valid_log_px"].astype(float) / (dims * math.log(2))
        frame["valid_bits_per_dim_se"] = frame["valid_log_px_se"].astype(float) / (
            dims * math.log(2)
        )
    return frame


def choose(trials: pd.DataFrame) -> pd.Series:
    """The trial with the highest importance-sampled log-likelihood of the validation split."""
    if set(trials["status"]) == {"pinned"}:
        return trials.iloc[0]
    scores = trials.loc[trials["status"] == "ok", "valid_log_px"].astype(float)
    scores = scores[scores.map(math.isfinite)]
    if scores.empty:
        faults = trials["error"].dropna()
        raise UserError(
            f"none of the sweep's {len(trials)} trials finished; the first one's reason: "
            f"{faults.iloc[0] if len(faults) else 'no finite likelihood'}"
        )
    return trials.loc[scores.idxmax()]


def best_config(job: TrainingJob, best: pd.Series, meta: Meta) -> dict[str, Any]:
    """best.json: a complete configuration, what it was chosen by and its score."""
    latent_dim = best["latent_dim"]
    model = replace(
        job.model,
        latent_dim=latent_dim if isinstance(latent_dim, tuple) else int(latent_dim),
        likelihood=best["likelihood"],
    )
    pinned = best["status"] == "pinned"
    discrete = meta.space != "continuous"
    score = best["valid_bits_per_dim"] if discrete else -best["valid_log_px"]
    return {
        "model": model.to_dict(),
        "objective": asdict(job.objective),
        "selected_by": "valid_bits_per_dim" if discrete else "valid_nll",
        "score": None if pinned else float(score),
        "trial_id": None if pinned else best["trial_id"],
    }


def describe(point: Mapping[str, Any] | pd.Series) -> str:
    return f"{point['likelihood']}, {point['latent_dim']} latent dimensions"


def score_of(trial: pd.Series) -> str:
    """A trial's score and its standard error, in the common unit."""
    if math.isfinite(trial["valid_bits_per_dim"]):
        found, error = trial["valid_bits_per_dim"], trial["valid_bits_per_dim_se"]
        return f"{found:.4f} ± {error:.4f} bits/dim"
    return f"log p(x) {trial['valid_log_px']:.3f} ± {trial['valid_log_px_se']:.3f} nats"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prepared", type=Path, required=True)
    parser.add_argument("--selfcheck", type=Path, required=True)
    parser.add_argument("--sweep", type=Path, required=True)
    paths = parser.parse_args()
    params = load_params()
    if not read_json(paths.selfcheck)["passed"]:
        raise UserError(f"{paths.selfcheck} says that the estimators disagree with exact answers")
    sweep(params, paths.prepared, paths.sweep)


if __name__ == "__main__":
    run_stage(main)
