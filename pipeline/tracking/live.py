"""The run that MLflow shows while it trains."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline.tracking.send import (
    EPOCH_METRICS,
    _epoch_points,
    _hash_tags,
    _model_title,
    _store,
    _warn,
)
from pipeline.tracking.store import (
    Unreachable,
    import_mlflow,
    store_address,
)

if TYPE_CHECKING:
    from pipeline.params import PlainParams


LIVE_WAIT_SECONDS = 10.0


SYSTEM_SECONDS = 5  # unless MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says otherwise


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
