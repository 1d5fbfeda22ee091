"""MLflow mirrors what DVC holds: runs are built, or completed, from the stages' output files.

Each `mirror_…` function may be called again at any time: it sends what the store lacks and
nothing twice. None of them raises when the store is slow or down: one warning says that
`make sync` (`python -m pipeline.tracking --sync`) sends the rest later. In `make run` evaluation
and page go with the registration.

The runs: a sweep with its trials as children; a model run, opened by the training and extended by
the evaluation and the registration, tagged with its sweep's run id.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.stage import UserError, full_disk, is_full_disk, read_json, run_stage, say
from pipeline.store import (
    Point,
    Store,
    Unreachable,
    import_mlflow,
    is_finite,
    store_address,
    without_password,
)
from vae.files import listed

if TYPE_CHECKING:
    from pipeline.sections import PlainParams

EPOCH_METRICS = {
    "train_elbo": "train/elbo",
    "train_log_px_z": "train/log_px_z",
    "train_kl": "train/kl",
    "valid_elbo": "valid/elbo",
    "valid_log_px_z": "valid/log_px_z",
    "valid_kl": "valid/kl",
    "learning_rate": "optimizer/learning_rate",
    "beta": "objective/beta",
    "images_per_s": "speed/images_per_s",
}
TRIAL_METRICS = (
    "valid_elbo",
    "valid_log_px",
    "valid_log_px_se",
    "valid_bits_per_dim",
    "valid_bits_per_dim_se",
    "khat_bad_fraction",
    "epochs",
    "seconds",
)
FAILED_TRIAL = ("diverged", "died")
LIVE_WAIT_SECONDS = 10.0
ENSURE_FOLLOWS_VARIABLE = "TIGHTBOUND_ENSURE_FOLLOWS"
SYSTEM_SECONDS = 5  # unless MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says otherwise

_warned: set[str] = set()  # addresses of stores that failed in this process, said once each


def mirror_sweep(params: PlainParams, sweep: Path) -> str | None:
    """The sweep's run with one child a trial, from trials.csv, best.json and run.json."""
    return _safely(params, lambda store: send_sweep(store, sweep))


def mirror_training(params: PlainParams, train: Path, model: Path, sweep: Path) -> str | None:
    """The model's run: parameters and the ELBO's terms at each epoch, at their own times."""
    return _safely(params, lambda store: send_training(store, train, model, sweep))


def mirror_evaluation(params: PlainParams, evaluate: Path, train: Path) -> str | None:
    """The model's run gets its importance-sampled likelihoods with their errors, and pictures."""
    if _ensure_follows():
        return None
    return _safely(params, lambda store: send_evaluation(store, evaluate, train))


def mirror_report(params: PlainParams, page: Path, train: Path) -> str | None:
    """The model's run gets the report page, which MLflow shows."""
    if _ensure_follows():
        return None
    return _safely(params, lambda store: send_report(store, page, train))


def _ensure_follows() -> bool:
    """Whether `register --ensure` follows, as in `make run`: it sends evaluation and page too.

    To open the store takes each stage seconds.
    """
    return bool(os.environ.get(ENSURE_FOLLOWS_VARIABLE))


def open_store(params: PlainParams) -> Store:
    """The store that params (or the environment) name. Raises UserError if it doesn't answer."""
    address = store_address(params.tracking.uri)
    try:
        return Store(address, params.tracking.experiment)
    except Unreachable as error:
        raise UserError(unreachable_message(address, error)) from error


def unreachable_message(address: str, error: Unreachable) -> str:
    """What a person can do about a store that does not answer."""
    if is_full_disk(str(error)):
        return full_disk(without_password(address))
    return (
        f"MLflow's store at {without_password(address)} does not answer ({error}); start it, or "
        "mend MLFLOW_TRACKING_URI or tracking.uri in params.yaml, and run the same command again"
    )


def send_sweep(store: Store, sweep: Path) -> str:
    """As `mirror_sweep`, to an open store; raises Unreachable."""
    facts = read_json(sweep / "run.json")
    best = read_json(sweep / "best.json")
    rows = _read_csv(sweep / "trials.csv")
    title = f"sweep of {len(rows)}: {_space_of(best)}"
    parent = store.run(facts["name"], title=title, started=facts["started"])
    current = {} if best["score"] is None else {best["selected_by"]: best["score"]}
    store.log(
        parent,
        params=facts["params"],
        current=current,
        tags=_hash_tags(facts) | {"tightbound.kind": "sweep", "best_trial": best["trial_id"] or ""},
    )
    for row in rows:
        _send_trial(store, parent, facts, row)
    names = ("trials.csv", "points.csv", "best.json", "sweep.png")
    store.log_files(parent, {f"sweep/{name}": sweep / name for name in names})
    store.finish(parent, title=title, finished=facts["finished"])
    return parent


def _send_trial(store: Store, parent: str, facts: Mapping[str, Any], row: dict[str, Any]) -> None:
    swept = {name: value for name, value in row.items() if "." in name}  # section.key
    words = "".join(f", {name.partition('.')[2]} {value}" for name, value in swept.items())
    title = f"{row['likelihood']}, {row['latent_dim']} latent{words}, seed {row['seed']}"
    key = f"{facts['name']}/{row['trial_id']}"
    run = store.run(key, title=title, started=facts["started"], parent=parent)
    settings = ("latent_dim", "likelihood", "seed", "num_samples")
    params = {name: row[name] for name in settings if row.get(name)} | swept
    tags = {"tightbound.kind": "trial", "trial_id": row["trial_id"], "trial_status": row["status"]}
    if row.get("error"):
        tags["error"] = row["error"]
    figures = {key: float(row[key]) for key in TRIAL_METRICS if row.get(key)}
    store.log(run, params=params, tags=_hash_tags(facts) | tags, current=figures)
    seconds = figures.get("seconds")
    finished = facts["finished"] if seconds is None else facts["started"] + seconds
    store.finish(run, title=title, finished=finished, failed=row["status"] in FAILED_TRIAL)


def send_training(store: Store, train: Path, model: Path, sweep: Path) -> str:
    """As `mirror_training`, to an open store; raises Unreachable."""
    facts = read_json(train / "run.json")
    config = read_json(model / "config.json")
    run = model_run(store, train)
    sweep_facts = read_json(sweep / "run.json")
    tags = _hash_tags(facts) | {
        "tightbound.kind": "model",
        "weights_hash": config["weights_sha256"],
        "sweep_run_id": store.known_run(sweep_facts["name"]) or send_sweep(store, sweep),
    }
    rows = _read_csv(train / "history.csv")
    summary = read_json(train / "metrics.json")
    store.log(
        run,
        params={"model": config["model"]} | facts["params"],
        tags=tags,
        points=[point for row in rows for point in _epoch_points(row)],
        current={f"training/{key}": value for key, value in summary.items() if is_finite(value)},
    )
    names = ("history.csv", "metrics.json")
    store.log_files(run, {f"train/{name}": train / name for name in names})
    store.finish(run, title=_model_title(facts), finished=facts["finished"])
    return run


def send_evaluation(store: Store, evaluate: Path, train: Path) -> str:
    """As `mirror_evaluation`, to an open store; raises Unreachable."""
    metrics = read_json(evaluate / "metrics.json")
    run = model_run(store, train)
    baseline = metrics.get("baseline") or {}
    current = {f"test/{key}": value for key, value in metrics.items() if is_finite(value)}
    current |= {f"baseline/{key}": value for key, value in baseline.items() if is_finite(value)}
    shifted = metrics.get("shifted") or {}
    current |= {f"shifted/{name}": found["auroc"] for name, found in shifted.items()}
    now = time.time()
    ladder = [
        Point(key="test/ladder", value=value, time=now, step=int(samples))
        for samples, value in metrics.get("ladder", {}).items()
    ]
    tags = {key: metrics[key] for key in ("collapse",) if metrics.get(key)}
    if baseline.get("name"):
        tags["baseline"] = baseline["name"]
    store.log(run, current=current, points=ladder, tags=tags)
    pictures = listed(evaluate, "*.png")
    files = [evaluate / "metrics.json", evaluate / "reference.json", *pictures]
    store.log_files(run, {f"evaluate/{path.name}": path for path in files})
    return run


def send_report(store: Store, page: Path, train: Path) -> str:
    """As `mirror_report`, to an open store; raises Unreachable."""
    run = model_run(store, train)
    store.log_files(run, {page.name: page})
    return run


def model_run(store: Store, train: Path) -> str:
    """The id of the run of the model that `train` describes; created where there is none."""
    facts = read_json(train / "run.json")
    return store.run(
        facts["name"],
        title=_model_title(facts),
        started=facts["started"],
        tags=_hash_tags(facts),
    )


class LiveRun:
    """Sends epochs, and this machine's load, to the model's run while it trains.

    From a thread; never blocks, never fails. MLflow is imported and its store opened when the first
    epoch has come, so that training doesn't begin later for it.
    """

    def __init__(self, params: PlainParams, facts: Mapping[str, Any]) -> None:
        self._queue: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._work, args=(facts,), name="mlflow-epochs", daemon=True
        )
        self._address = store_address(params.tracking.uri)
        self._experiment = params.tracking.experiment
        self._failure: str | None = None

    def start(self) -> None:
        """Wait for epochs, in a thread."""
        self._thread.start()

    def log_epoch(self, row: Mapping[str, Any]) -> None:
        """Send one row of history.csv, soon."""
        self._queue.put(dict(row))

    def _work(self, facts: Mapping[str, Any]) -> None:
        row = self._queue.get()
        if row is None:
            return
        try:
            store = _store(self._address, self._experiment)
            title = _model_title(facts)
            tags = _hash_tags(facts) | {"tightbound.kind": "model"}
            run = store.run(facts["name"], title=title, started=facts["started"], tags=tags)
            store.log(run, params=facts["params"])
            present = store.steps(run, EPOCH_METRICS.values())
            with _system_metrics(run, self._address):
                for rows in self._batches(row):
                    points = [point for each in rows for point in _epoch_points(each)]
                    store.extend(run, points, present)
        except Unreachable as error:
            self._failure = str(error)
        except Exception as error:  # a fault of the tracker must never reach the training
            self._failure = f"{type(error).__name__}: {error}"

    def _batches(self, row: Mapping[str, Any] | None) -> Iterator[list[Mapping[str, Any]]]:
        """`row` and what comes after it, until `close`: each time all that has queued up."""
        rows = []
        while row is not None:
            rows.append(row)
            if self._queue.empty():
                yield rows
                rows = []
            row = self._queue.get()
        if rows:
            yield rows

    def close(self, wait: float) -> None:
        """Send what is queued, for at most `wait` seconds, and warn if that fails."""
        self._queue.put(None)
        self._thread.join(wait)
        if self._thread.is_alive():
            _warn(self._address, f"no answer within {wait:g} s")
        elif self._failure is not None:
            _warn(self._address, self._failure)


@contextmanager
def _system_metrics(run: str, address: str) -> Iterator[None]:
    """MLflow's own `system/…` of this machine: CPU, memory, disk, network, GPU (nvidia-ml-py)."""
    import_mlflow()
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(
        run, sampling_interval=SYSTEM_SECONDS, resume_logging=True, tracking_uri=address
    )
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


@contextmanager
def live_run(params: PlainParams, facts: Mapping[str, Any]) -> Iterator[LiveRun]:
    """Live curves in MLflow while the block trains; `mirror_training` completes them afterwards.

    facts: what run.json will hold, as far as it is known: name, started, params, data_hash,
    stage_hash. At the block's end at most 10 s are spent on what is still queued.
    """
    run = LiveRun(params, facts)
    run.start()
    try:
        yield run
    finally:
        run.close(LIVE_WAIT_SECONDS)


def sync(
    params: PlainParams, *, sweep: Path, model: Path, train: Path, evaluate: Path, report: Path
) -> list[str]:
    """Bring the store up to date with all outputs that are there; returns what was looked at.

    Raises UserError if the store doesn't answer.
    """
    store = open_store(params)
    done = []
    try:
        if (sweep / "run.json").is_file():
            send_sweep(store, sweep)
            done.append("sweep")
        if (train / "run.json").is_file():
            send_training(store, train, model, sweep)
            done.append("training")
        if (evaluate / "metrics.json").is_file() and (train / "run.json").is_file():
            send_evaluation(store, evaluate, train)
            done.append("evaluation")
        if report.is_file() and (train / "run.json").is_file():
            send_report(store, report, train)
            done.append("report")
    except Unreachable as error:
        raise UserError(unreachable_message(store.address, error)) from error
    return done


def _safely(params: PlainParams, send: Callable[[Store], str]) -> str | None:
    """Run `send`; a store that fails costs one warning in this process, and nothing else."""
    address = store_address(params.tracking.uri)
    if address in _warned:
        return None
    try:
        return send(_store(address, params.tracking.experiment))
    except Unreachable as error:
        _warn(address, str(error))
    except UserError:
        raise
    except Exception as error:  # such as an artifact store's own; it must never fail a training
        _warn(address, f"{type(error).__name__}: {error}")
    return None


@cache
def _store(address: str, experiment: str) -> Store:
    return Store(address, experiment)


def _warn(address: str, reason: str) -> None:
    if address in _warned:
        return
    _warned.add(address)
    where = without_password(address)
    print(
        f"warning: MLflow at {where} was not reached ({reason}); all results lie in reports/ and "
        "`make sync` sends them later",
        file=sys.stderr,
        flush=True,
    )


def _epoch_points(row: Mapping[str, Any]) -> list[Point]:
    return [
        Point(key=name, value=float(row[key]), time=float(row["time"]), step=int(row["epoch"]))
        for key, name in EPOCH_METRICS.items()
        if row.get(key) not in (None, "")
    ]


def _hash_tags(facts: Mapping[str, Any]) -> dict[str, str]:
    return {key: str(facts[key]) for key in ("data_hash", "stage_hash")}


def _model_title(facts: Mapping[str, Any]) -> str:
    """The model in words, after the name of the DVC experiment that it was trained in, if any."""
    params = facts["params"]
    likelihood, size = params.get("model.likelihood"), params.get("model.latent_dim")
    words = f"{likelihood}, {size} latent" if likelihood and size else str(facts["name"])
    return f"{facts['experiment']}: {words}" if facts.get("experiment") else words


def _space_of(best: Mapping[str, Any]) -> str:
    model = best["model"]
    dims = math.prod(model["data_shape"])
    return f"{model['space']}, {dims} dimensions"


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def main() -> None:
    parser = argparse.ArgumentParser(description="Bring MLflow up to date with the outputs.")
    parser.add_argument("--sync", action="store_true", required=True)
    parser.add_argument("--sweep", type=Path, default=Path("reports/sweep"))
    parser.add_argument("--model", type=Path, default=Path("models/vae"))
    parser.add_argument("--train", type=Path, default=Path("reports/train"))
    parser.add_argument("--evaluate", type=Path, default=Path("reports/evaluate"))
    parser.add_argument("--report", type=Path, default=Path("reports/report.html"))
    paths = parser.parse_args()
    from pipeline.plain_params import load_plain_params

    params = load_plain_params()
    done = sync(
        params,
        sweep=paths.sweep,
        model=paths.model,
        train=paths.train,
        evaluate=paths.evaluate,
        report=paths.report,
    )
    where = store_address(params.tracking.uri)
    say(f"sync       {', '.join(done) or 'nothing'} mirrored in {where}")


if __name__ == "__main__":
    run_stage(main)
