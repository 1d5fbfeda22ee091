"""MLflow mirrors what DVC holds: runs are built, or completed, from the stages' output files.

Each `mirror_…` function may be called again at any time: it sends what the store lacks and
nothing twice. None of them raises when the store is slow or down: one warning says that
`make sync` (`python -m pipeline.tracking --sync`) sends the rest later. In `make run` evaluation
and page go with the registration.

The runs: a sweep with its trials as children; a model run, opened by the training and extended by
the evaluation and the registration, tagged with its sweep's run id.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.stage import UserError
from pipeline.tracking.send import (
    _store,
    _warn,
    _warned,
    open_store,
    send_evaluation,
    send_report,
    send_sweep,
    send_training,
    unreachable_message,
)
from pipeline.tracking.store import (
    Store,
    Unreachable,
    store_address,
)

if TYPE_CHECKING:
    from pipeline.params import PlainParams

ENSURE_FOLLOWS_VARIABLE = "TIGHTBOUND_ENSURE_FOLLOWS"


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
