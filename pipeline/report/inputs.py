"""What the report is made of: the other stages' files, read once."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.stage import UserError, read_json
from vae.system import listed


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything the page is made of, as read from the other stages' files."""

    meta: dict[str, Any]
    selfcheck: dict[str, Any]
    trials: pd.DataFrame
    points: pd.DataFrame
    best: dict[str, Any]
    sweep_run: dict[str, Any]
    train_metrics: dict[str, Any]
    history: pd.DataFrame
    train_run: dict[str, Any]
    metrics: dict[str, Any]
    examples: pd.DataFrame
    pictures: dict[str, str]
    register: dict[str, Any]

    @property
    def unit(self) -> str:
        """Of the sweep: bits/dim in `grey8`, else nats."""
        return "bits/dim" if self.meta["space"] == "grey8" else "nats"


def read_inputs(
    prepared: Path, selfcheck: Path, sweep: Path, train: Path, evaluate: Path, register: Path
) -> Inputs:
    """Read the stages' files; raises UserError naming the first that is missing or damaged."""
    pictures = {
        name: _data_uri(evaluate / name)
        for name in (path.name for path in listed(evaluate, "*.png"))
    }
    return Inputs(
        meta=read_json(prepared / "meta.json"),
        selfcheck=read_json(selfcheck),
        trials=_read_table(sweep / "trials.csv"),
        points=_read_table(sweep / "points.csv"),
        best=read_json(sweep / "best.json"),
        sweep_run=read_json(sweep / "run.json"),
        train_metrics=read_json(train / "metrics.json"),
        history=_read_table(train / "history.csv"),
        train_run=read_json(train / "run.json"),
        metrics=read_json(evaluate / "metrics.json"),
        examples=_scored(_read_table(evaluate / "per_example.parquet")),
        pictures=pictures,
        register=read_json(register),
    )


def _scored(examples: pd.DataFrame) -> pd.DataFrame:
    """The test examples that have a log p(x)."""
    return examples.loc[np.isfinite(examples["log_px"].to_numpy(dtype=float))]


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; `dvc repro` makes it") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); `dvc repro --force` remakes it"
        ) from error
