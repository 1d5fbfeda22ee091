"""Running a sweep's trials under Ray Tune, or going on with those of an interrupted sweep."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.cluster import connect as cluster, open_storage, require_shared, runs
from pipeline.params import Params, ScalingParams
from pipeline.stage import say, steps
from pipeline.sweep.journal import ATTEMPT, WORKERS, Journal, Trial
from pipeline.sweep.search import SCORE, Plan, tune_arguments
from pipeline.sweep.trial import Setting, tune_trial
from pipeline.sweep.trial_of_workers import NO_CPU, Workers, tune_workers
from pipeline.train import TrainingArrays, TrainingJob

KEPT_CHECKPOINTS = 2  # of each trial


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one trial takes: so many workers, each with so many CPUs and GPUs."""

    workers: int
    cpus: float
    gpus: float

    @classmethod
    def of(cls, scaling: ScalingParams) -> Resources:
        gpus = scaling.gpus_per_trial if scaling.use_gpu else 0.0
        return cls(workers=scaling.workers_per_trial, cpus=scaling.threads_per_worker, gpus=gpus)

    def request(self) -> dict[str, float]:
        """What Tune reserves for a trial of one worker."""
        return {"cpu": self.cpus, "gpu": self.gpus}

    def at_once(self) -> int:
        """How many trials the connected cluster holds at a time."""
        fits = cluster.num_cpus() // self.cpus
        if self.gpus:
            fits = min(fits, cluster.num_gpus() / self.gpus)
        return int(fits // self.workers)


def run_trials(
    params: Params, plan: Plan, job: TrainingJob, arrays: TrainingArrays, content_hash: str
) -> list[dict[str, Any]]:
    """Train every trial of the sweep that isn't finished yet; one row of trials.csv for each.

    job: without point and seed. content_hash: of all that any trial's result depends on besides
    its own job.
    """
    storage = params.scaling.storage
    with runs.claim("sweep", content_hash, storage) as run:
        journal = Journal(open_storage(storage), run.name, job)
        known = plan.known(journal)
        finished = {name: r.row for name, r in journal.records.items() if r.row and r.finished}
        todo: list[Trial] | None = [t for t in known if journal.id(t) not in finished]
        if any(journal.id(trial) in journal.records for trial in known):
            done = len(known) - len(todo)
            say(f"sweep      goes on: {done} of {plan.num_trials} trials are finished")
        if plan.trials is None and len(known) < plan.num_trials:
            todo = None  # it has points to propose
        if todo is None or todo:
            setting = Setting(
                job=job,
                space=plan.space,
                num_importance_samples=params.sweep.num_importance_samples,
                every_epoch=params.sweep.scheduler == "asha",
                use_gpu=params.scaling.use_gpu,
                finished=finished,
                checkpoints=journal.checkpoints(),
            )
            size = cluster.store_size(arrays.nbytes)
            with cluster.connect(object_store_bytes=size, needs="ray.tune"):
                require_shared(run.storage, key="scaling.storage")
                for left in reversed(range(params.scaling.max_failures + 1)):
                    _run(params, plan, setting, arrays, journal, todo, run.address, last=not left)
                    todo = [
                        trial
                        for trial in plan.known(journal)
                        if not ((record := journal.records.get(journal.id(trial))) and record.row)
                    ]
                    if not todo:
                        break
        rows = _rows(journal, plan.known(journal))
        journal.clear()
    return rows


def _run(
    params: Params,
    plan: Plan,
    setting: Setting,
    arrays: TrainingArrays,
    journal: Journal,
    todo: Sequence[Trial] | None,
    address: str,
    *,
    last: bool,
) -> None:
    from ray import tune

    from pipeline.sweep.trial_log import TrialLog

    resources = Resources.of(params.scaling)
    cluster.require(
        resources.cpus,
        resources.gpus,
        workers=resources.workers,
        key="scaling.workers_per_trial (or scaling.threads_per_worker, scaling.use_gpu)",
    )
    sweep = params.sweep
    at_once = sweep.max_concurrent
    if todo is None or resources.workers > 1:
        # Without a limit Tune would ask Optuna for many proposals before the first result, and
        # trials of several workers would each hold what the others wait for.
        at_once = min(at_once or math.inf, max(1, resources.at_once()))
    total = plan.num_trials
    before = 0 if todo is None else total - len(todo)
    param_space, search = tune_arguments(setting.space, sweep, journal, todo)
    tuner = tune.Tuner(
        _trainable(params.scaling, resources, setting, arrays, address),
        param_space=param_space,
        tune_config=tune.TuneConfig(
            scheduler=_scheduler(params),
            max_concurrent_trials=None if at_once is None else int(at_once),
            reuse_actors=resources.workers == 1,  # one that is stopped within Ray Train can't be
            trial_name_creator=_name,
            trial_dirname_creator=_name,
            **search,
        ),
        run_config=tune.RunConfig(
            failure_config=tune.FailureConfig(max_failures=params.scaling.max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
            name=f"{ATTEMPT}{time.time_ns()}",
            storage_path=address,
            verbose=0,
            callbacks=[TrialLog(setting.space, journal, setting.job.model, before, last)],
        ),
    )
    with steps("sweep", total, "trial", lines=total, done=before), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)  # Repeater's
        tuner.fit()


def _trainable(
    scaling: ScalingParams,
    resources: Resources,
    setting: Setting,
    arrays: TrainingArrays,
    address: str,
) -> Any:
    """The function of a trial, with what it takes."""
    import ray
    from ray import tune

    if resources.workers == 1:
        function = tune.with_parameters(tune_trial, setting=setting, arrays=arrays)
        return tune.with_resources(function, resources.request())
    workers = Workers(
        count=resources.workers,
        use_gpu=scaling.use_gpu,
        max_failures=scaling.max_failures,
        storage=f"{address}/{WORKERS}",
    )
    function = tune.with_parameters(
        tune_workers, setting=setting, workers=workers, arrays=[ray.put(arrays)]
    )
    return tune.with_resources(function, NO_CPU)


def _name(trial: Any) -> str:
    return f"trial_{trial.trial_id}"


def _scheduler(params: Params) -> Any:
    """None, or ASHA, whose result depends on the order in which trials report."""
    if params.sweep.scheduler != "asha":
        return None
    from ray.tune.schedulers import ASHAScheduler

    return ASHAScheduler(time_attr="epoch", metric=SCORE, mode="max", max_t=params.sweep.epochs)


def _rows(journal: Journal, plan: Sequence[Trial]) -> list[dict[str, Any]]:
    """The rows of the plan's trials, as far as they were run."""
    records = [journal.records.get(journal.id(trial)) for trial in plan]
    return [record.row for record in records if record is not None and record.row is not None]
