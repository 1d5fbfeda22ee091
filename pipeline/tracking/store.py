"""The MLflow store: where it is, its runs, and sending to them only what is missing.

The driver alone opens it and creates the database first, so sqlite is safe. Which run belongs to
what is kept in `.tightbound/runs.json` (by address and name), which is nobody's dependency; a run
that is gone from the store is made anew.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pipeline.stage import UserError, project_root, whole_file
from vae.system import file_hash

URI_VARIABLE = "MLFLOW_TRACKING_URI"
COMMIT_VARIABLE = "TIGHTBOUND_GIT_COMMIT"
SQLITE = "sqlite:///"
FILES_TAG = "tightbound.files"
DIGEST_LENGTH = 36  # the longest that MLflow takes
METRICS_PER_CALL, PARAMS_PER_CALL, LONGEST_PARAM = 1000, 100, 6000

# A server that is down or hangs costs seconds, not minutes; a user's own setting wins.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


class Unreachable(Exception):  # noqa: N818
    """The tracking store does not answer, or refuses; its message says why, in one line."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One value of a metric: time in unix seconds, step an epoch or a number of samples."""

    key: str
    value: float
    time: float
    step: int = 0


def set_environment() -> None:
    """What MLflow reads when it is imported: quiet, telemetry off. Ray Tune imports it too."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@cache
def import_mlflow() -> Any:
    """MLflow, imported late (it takes a second), quiet, with telemetry off."""
    set_environment()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow

        # Ray may have imported MLflow already, before the settings above could count.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # what is raised too
        logging.getLogger("alembic").setLevel(logging.WARNING)
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # each retry
        logging.getLogger("mlflow.system_metrics").setLevel(
            logging.CRITICAL
        )  # a store that is down
        logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)  # a venv without pip
    return mlflow


def store_address(uri: str | None) -> str:
    """The store's address: `MLFLOW_TRACKING_URI`, else `tracking.uri`, else the local database.

    A relative sqlite path is taken from the repository, whatever the current folder.
    Raises UserError for a folder, which MLflow no longer accepts as a store.
    """
    chosen = os.environ.get(URI_VARIABLE) or uri or f"{SQLITE}mlflow.db"
    origin = URI_VARIABLE if os.environ.get(URI_VARIABLE) else "tracking.uri in params.yaml"
    if chosen.startswith(SQLITE):
        return SQLITE + str(project_root() / chosen.removeprefix(SQLITE))
    if "://" not in chosen or chosen.startswith("file:"):
        raise UserError(
            f"{origin} is {chosen!r}: MLflow keeps no runs in plain folders any more; "
            "expected sqlite:///path/mlflow.db or http://host:port"
        )
    return chosen


def without_password(address: str) -> str:
    """The address as it may be written down: a user's name and password are left out."""
    parts = urlsplit(address)
    if "@" not in parts.netloc:
        return address
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


class Store:
    """An open store and one experiment in it. Any failure of MLflow is raised as `Unreachable`."""

    def __init__(self, address: str, experiment: str) -> None:
        """Open the store, creating database and experiment where they don't exist yet."""
        self.address = address
        self.public_address = without_password(address)
        mlflow = import_mlflow()
        artifacts, database = None, Path(address.removeprefix(SQLITE))
        if address.startswith(SQLITE):
            database.parent.mkdir(parents=True, exist_ok=True)
            artifacts = (database.parent / "mlartifacts").as_uri()
        with self.failures(), _opening(address):
            if address.startswith(SQLITE) and not database.exists():
                _create(database)
            self.client = mlflow.MlflowClient(tracking_uri=address, registry_uri=address)
            self.experiment_id = self._experiment(experiment, artifacts)

    def _experiment(self, name: str, artifacts: str | None) -> str:
        """The id of the experiment, created if there is none, restored if it was deleted."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            with another_may_be_faster():
                return self.client.create_experiment(name, artifacts)
            found = self.client.get_experiment_by_name(name)
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return found.experiment_id

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Turn what MLflow, its HTTP client, database and files raise into `Unreachable`."""
        import requests
        import sqlalchemy.exc

        mlflow_error = import_mlflow().exceptions.MlflowException
        foreign = (mlflow_error, requests.RequestException, sqlalchemy.exc.SQLAlchemyError, OSError)
        try:
            yield
        except foreign as error:
            raise Unreachable(_reason(error)) from error

    def run(
        self,
        key: str,
        *,
        title: str,
        started: float,
        parent: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """The id of the run known as `key`; created where the store has none.

        title: its name for people. started: unix seconds. tags: set at creation only, with the
        git commit of that moment.
        """
        known = self.known_run(key)
        if known is not None:
            return known
        all_tags = {**(tags or {}), "tightbound.key": key}
        if (commit := git_commit()) is not None:
            all_tags["mlflow.source.git.commit"] = commit
        if parent is not None:
            all_tags["mlflow.parentRunId"] = parent
        with self.failures():
            run = self.client.create_run(
                self.experiment_id, start_time=_ms(started), tags=all_tags, run_name=title
            )
        remember_run(self.public_address, key, run.info.run_id)
        return run.info.run_id

    def known_run(self, key: str) -> str | None:
        """The id of the run known as `key`, if it is still there and not deleted."""
        run_id = known_runs().get(self.public_address, {}).get(key)
        return run_id if run_id is not None and self.is_active(run_id) else None

    def is_active(self, run_id: str) -> bool:
        """Whether the store has this run, and it was not deleted."""
        with self.failures():
            try:
                return self.client.get_run(run_id).info.lifecycle_stage == "active"
            except import_mlflow().exceptions.MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return False
                raise

    def log(
        self,
        run_id: str,
        *,
        points: Iterable[Point] = (),
        current: Mapping[str, float] | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Send what the run lacks.

        points: sent where their key has no value at that step. current: figures whose latest
        value counts, sent where it differs. params and tags: nested mappings are flattened to
        dotted keys; a parameter that is already there stays. Values that are not finite numbers
        are left out, since the store would turn infinity into 1.8e308.
        """
        from mlflow.entities import Metric, Param, RunTag

        points = list(points)
        with self.failures():
            data = self.client.get_run(run_id).data
            self.extend(
                run_id, points, self.steps(run_id, {p.key for p in points} & {*data.metrics})
            )
            now = _ms(time.time())
            metrics = [
                Metric(key, float(value), now, 0)
                for key, value in (current or {}).items()
                if is_finite(value) and data.metrics.get(key) != float(value)
            ]
            new_params = [
                Param(key, str(value)[:LONGEST_PARAM])
                for key, value in flatten(params or {}).items()
                if key not in data.params
            ]
            new_tags = [
                RunTag(key, str(value))
                for key, value in (tags or {}).items()
                if data.tags.get(key) != str(value)
            ]
            self._log_metrics(run_id, metrics)
            for start in range(0, len(new_params), PARAMS_PER_CALL):
                self.client.log_batch(run_id, params=new_params[start : start + PARAMS_PER_CALL])
            if new_tags:
                self.client.log_batch(run_id, tags=new_tags)

    def steps(self, run_id: str, keys: Iterable[str]) -> dict[str, set[int]]:
        """The steps at which the run has values, by metric."""
        with self.failures():
            return {
                key: {metric.step for metric in self.client.get_metric_history(run_id, key)}
                for key in keys
            }

    def extend(self, run_id: str, points: Iterable[Point], present: dict[str, set[int]]) -> None:
        """Send points at steps that are not in `present` (see `steps`), which then has them too."""
        from mlflow.entities import Metric

        missing = {
            (point.key, point.step): point
            for point in points
            if is_finite(point.value) and point.step not in present.get(point.key, ())
        }
        self._log_metrics(
            run_id,
            [
                Metric(point.key, float(point.value), _ms(point.time), point.step)
                for point in missing.values()
            ],
        )
        for key, step in missing:
            present.setdefault(key, set()).add(step)

    def _log_metrics(self, run_id: str, metrics: Sequence[Any]) -> None:
        with self.failures():
            for start in range(0, len(metrics), METRICS_PER_CALL):
                self.client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_CALL])

    def log_data(self, run_id: str, meta: Mapping[str, Any]) -> None:
        """Name the data (meta.json) as the run's input, once: name, hash, shape and counts."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(
            name=meta["dataset"],
            digest=meta["hash"][:DIGEST_LENGTH],
            source_type="tightbound",
            source=json.dumps({"data.source": meta["source"], "hash": meta["hash"]}),
            schema=json.dumps({key: meta[key] for key in ("space", "data_shape")}),
            profile=json.dumps(meta["counts"]),
        )
        with self.failures():
            inputs = self.client.get_run(run_id).inputs.dataset_inputs
            if data.digest not in {entry.dataset.digest for entry in inputs}:
                context = InputTag("mlflow.data.context", "train, valid, test")
                insist(self.client.log_inputs, run_id, [DatasetInput(data, [context])])

    def log_files(self, run_id: str, files: Mapping[str, Path]) -> None:
        """Send files (by their path in the run) that the run lacks or has otherwise.

        Their hashes are kept in a tag of the run, so that nothing is sent twice.
        """
        hashes = {name: file_hash(path)[:16] for name, path in files.items() if path.is_file()}
        if not hashes:
            return
        with self.failures():
            tags = self.client.get_run(run_id).data.tags
            sent = json.loads(tags.get(FILES_TAG, "{}"))
            there = self._artifact_names(run_id, {str(Path(name).parent) for name in hashes})
            fresh = {k: v for k, v in hashes.items() if sent.get(k) != v or k not in there}
            for name in fresh:
                local, folder = files[name], str(Path(name).parent)
                if Path(name).name != local.name:
                    raise ValueError(f"{local} can't be sent under another name ({name})")
                self.client.log_artifact(run_id, str(local), None if folder == "." else folder)
            if fresh:
                self.client.set_tag(run_id, FILES_TAG, json.dumps(sent | fresh))

    def _artifact_names(self, run_id: str, folders: set[str]) -> set[str]:
        return {
            entry.path
            for folder in folders
            for entry in self.client.list_artifacts(run_id, None if folder == "." else folder)
        }

    def finish(self, run_id: str, *, title: str, finished: float, failed: bool = False) -> None:
        """Close a run at `finished` (unix seconds) under its final name, if it isn't already."""
        status = "FAILED" if failed else "FINISHED"
        with self.failures():
            info = self.client.get_run(run_id).info
            if info.run_name != title:
                self.client.update_run(run_id, name=title)
            if (info.status, info.end_time) != (status, _ms(finished)):
                self.client.set_terminated(run_id, status, _ms(finished))


def runs_file() -> Path:
    """Which run belongs to what: `{address: {name: run id}}`."""
    return project_root() / ".tightbound" / "runs.json"


def known_runs() -> dict[str, dict[str, str]]:
    """The contents of `runs_file`; a missing or damaged file counts as empty."""
    try:
        content = json.loads(runs_file().read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def remember_run(address: str, key: str, run_id: str) -> None:
    """Note a run's id; safe beside other processes that do the same."""
    with _one_at_a_time(runs_file().with_suffix(".lock")):
        runs = known_runs()
        runs.setdefault(address, {})[key] = run_id
        with whole_file(runs_file()) as fresh:
            fresh.write_text(json.dumps(runs, indent=1) + "\n")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys; None, which says nothing, is left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def is_finite(value: Any) -> bool:
    """Whether a value is a number that a store can hold."""
    return isinstance(value, int | float) and math.isfinite(value)


@contextmanager
def another_may_be_faster() -> Iterator[None]:
    """Let it pass that what the block creates is there by now: another pipeline made it."""
    try:
        yield
    except import_mlflow().exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def insist(write: Callable[..., None], *arguments: object) -> None:
    """Write what may be written twice; once more if the database refuses it.

    MLflow looks for a row and then inserts it: of two pipelines that do so at once one is refused,
    and finds the row there when it tries again.
    """
    try:
        write(*arguments)
    except import_mlflow().exceptions.MlflowException as error:
        if error.error_code != "BAD_REQUEST":
            raise
        write(*arguments)


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Hold the lock file `path` alone, whoever else waits for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _opening(address: str) -> Iterator[None]:
    """Open a database alone, and without SQLAlchemy's warnings about MLflow's own code.

    A fresh sqlite database breaks when two processes, maybe of two projects, migrate it at once.
    """
    if not address.startswith(SQLITE):
        yield
        return
    with _one_at_a_time(Path(f"{address.removeprefix(SQLITE)}.lock")), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _create(database: Path) -> None:
    """MLflow's tables, whole or not at all: it can't go on with a database that it half made."""
    with whole_file(database) as fresh:
        import_mlflow().MlflowClient(f"{SQLITE}{fresh}").search_experiments(max_results=1)


@cache
def git_commit() -> str | None:
    """The commit that is checked out, if git knows one here; a submitted copy is told it."""
    if given := os.environ.get(COMMIT_VARIABLE):
        return given
    git = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _reason(error: BaseException) -> str:
    """The cause of a failure in a few words, out of messages that span many lines."""
    text = str(error).strip()
    for sign in ("Connection refused", "timed out", "Failed to resolve", "database is locked"):
        if sign in text:
            return sign.lower()
    return (text.splitlines() or [type(error).__name__])[0][:200]


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
