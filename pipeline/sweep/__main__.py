"""Sweep stage: Ray Tune over latent dimension, likelihood and whatever else `sweep.space` names.

Reads data/prepared and selfcheck.json (which must have passed). Writes reports/sweep:
trials.csv, points.csv, best.json (a complete model and objective), sweep.png, run.json.

Points are ranked by the importance-sampled log-likelihood of the validation split in the space's
common unit (bits/dim for discrete data), so that all likelihoods compete fairly; never by a raw
density and never by a bound that differs between likelihoods.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd

from pipeline.cluster import runs
from pipeline.figures import sweep_plot
from pipeline.params import Axis, Params, Point, combinations, describe, load_params, section_values
from pipeline.stage import Meta, UserError, load_meta, read_json, run_stage, say, spared, write_json
from pipeline.sweep import ranking
from pipeline.sweep.run_trials import run_trials
from pipeline.sweep.search import Plan, is_pinned
from pipeline.tracking import mirror as tracking
from pipeline.train import TrainingJob, load_arrays
from vae.models import VAEConfig
from vae.system import whole_directory

SEARCH = (
    "search",
    "num_trials",
    "num_seeds",
    "seed",
)  # of `sweep`, what decides which trials there are


def sweep(params: Params, prepared: Path, out: Path) -> None:
    """Run the sweep, or go on with an interrupted one, and write its results to `out`."""
    meta = load_meta(prepared)
    axes = params.axes
    job = base_job(params, meta)
    settings = shared_settings(params, axes, meta)
    everything = settings | {
        "search": {key: value for key, value in vars(params.sweep).items() if key in SEARCH},
        "axes": {axis.key: axis.to_json() for axis in axes},
        "model": job.model.to_dict(),
        "objective": asdict(job.objective),
        "training": asdict(job.training),
    }
    facts = runs.run_facts("sweep", runs.stage_hash("sweep", everything), meta.hash, everything)
    if is_pinned(axes):
        point = next(combinations(axes))
        say(f"sweep      one point, nothing to train: {describe(point)}")
        rows = [{"trial_id": ranking.PINNED, "status": ranking.PINNED, **point}]
    else:
        plan = Plan.of(axes, params.sweep)
        announce(plan)
        arrays = load_arrays(prepared, meta, limit_mb=params.training.memory_limit_mb)
        rows = run_trials(params, plan, job, arrays, runs.stage_hash("sweep", settings))
    found = ranking.points_of(rows, [axis.key for axis in axes])
    trials = ranking.trial_rows(rows, found, meta)
    points = ranking.point_rows(trials, found)
    best = ranking.choose(points, trials)
    point = found[best["point"] - 1]
    if not is_pinned(axes):
        say(f"sweep      chosen: {describe(point)}, {ranking.score_of(best)}")
    with whole_directory(out) as fresh:
        pd.DataFrame(trials).to_csv(fresh / "trials.csv", index=False)
        table = pd.DataFrame(points)
        table.to_csv(fresh / "points.csv", index=False)
        write_json(fresh / "best.json", ranking.best_config(job, point, best, meta))
        spared("sweep", "sweep.png", lambda: sweep_plot(table, fresh / "sweep.png"))
        write_json(fresh / "run.json", facts | {"finished": time.time()})
    tracking.mirror_sweep(params, out)


def base_job(params: Params, meta: Meta) -> TrainingJob:
    """A job at the space's first point, to which the trials put their own.

    Raises UserError for points that this data doesn't allow.
    """
    axes = params.axes
    return TrainingJob(
        model=checked_models(axes, asdict(params.model), meta),
        objective=replace(params.objective, **first_values(axes, "objective")),
        training=replace(
            params.training,
            **first_values(axes, "training"),
            epochs=params.sweep.epochs,
            seed=params.sweep.seed,
            patience=None,
        ),
        threads=params.scaling.threads_per_worker,
    )


def first_values(axes: Sequence[Axis], section: str) -> dict[str, Any]:
    return section_values(next(combinations(axes)), section)


def checked_models(axes: Sequence[Axis], values: Mapping[str, Any], meta: Meta) -> VAEConfig:
    """The model at the space's first point, once all others are known to fit the data too."""
    models: list[VAEConfig] = []
    faults: dict[str, Point] = {}
    for point in combinations([axis for axis in axes if axis.key.startswith("model.")]):
        own = {**values, **section_values(point, "model")}
        try:
            models.append(VAEConfig(data_shape=meta.data_shape, space=meta.space, **own))
        except ValueError as error:
            faults.setdefault(str(error), point)
    if faults:
        told = [f"{describe(point)}: {fault}" for fault, point in list(faults.items())[:3]]
        raise UserError("the sweep's space does not fit the data:\n  " + "\n  ".join(told))
    return models[0]


def shared_settings(params: Params, axes: Sequence[Axis], meta: Meta) -> dict[str, Any]:
    """What a trial's result depends on besides its own job.

    Under asha, which compares the trials with each other, that is the whole space too.
    """
    shared: dict[str, Any] = {
        "scheduler": params.sweep.scheduler,
        "num_importance_samples": params.sweep.num_importance_samples,
        "data": meta.hash,
    }
    if params.sweep.scheduler == "asha":
        shared["space"] = {axis.key: axis.to_json() for axis in axes}
        shared["trials"] = [params.sweep.search, params.sweep.num_trials]
    return shared


def announce(plan: Plan) -> None:
    """Say what is searched and how."""
    keys = [ranking.column(axis.key) for axis in plan.space.axes if axis.size > 1]
    sweep = plan.sweep
    seeds = f", {sweep.num_seeds} seeds a point" if sweep.num_seeds > 1 else ""
    say(
        f"sweep      which {', '.join(keys)}? {sweep.search} search, {plan.num_trials} trials "
        f"of {sweep.epochs} epochs{seeds}"
    )


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
