"""What a stage wrote, sent to MLflow."""

from __future__ import annotations

import csv
import math
import sys
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.stage import UserError, full_disk, is_full_disk, read_json
from pipeline.tracking.store import (
    Point,
    Store,
    Unreachable,
    is_finite,
    store_address,
    without_password,
)
from vae.system import listed

if TYPE_CHECKING:
    from pipeline.params import PlainParams


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


_warned: set[str] = set()  # addresses of stores that failed in this process, said once each


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
    run = _model_run(store, facts)
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
    return _model_run(store, read_json(train / "run.json"))


def _model_run(store: Store, facts: dict[str, Any]) -> str:
    return store.run(
        facts["name"],
        title=_model_title(facts),
        started=facts["started"],
        tags=_hash_tags(facts),
    )


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
