"""Models and training states on disk: safetensors and JSON, never a pickle.

A model folder holds `weights.safetensors` and `config.json` (the `VAEConfig` and the SHA-256 of
the weights). A training state's folder holds `state.safetensors` and `state.json` likewise.
Folders appear whole: they are written beside their place and renamed.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path

from torch import Tensor

from vae.models import VAE, CheckpointError
from vae.models.saved_model import _load_tensors, _read_facts, _save_tensors
from vae.system import file_hash, whole_directory
from vae.training.state import EpochStats, TrainingState

STATE_TENSORS, STATE_FACTS = "state.safetensors", "state.json"


def save_state(model: VAE, state: TrainingState, folder: str | os.PathLike[str]) -> None:
    """Write all that training needs to go on: current and best weights, optimiser, history."""
    tensors = {
        f"{group}/{name}": value
        for group, values in (
            ("model", model.state_dict()),
            ("best", state.best_weights),
            ("optimizer", state.optimizer),
        )
        for name, value in values.items()
    }
    with whole_directory(folder) as fresh:
        _save_tensors(tensors, fresh / STATE_TENSORS)
        facts = {
            "format": 1,
            "weights_sha256": file_hash(fresh / STATE_TENSORS),
            "epoch": state.epoch,
            "best_bound": state.best_bound if state.best_epoch else None,
            "best_epoch": state.best_epoch,
            "history": [stats.to_row() for stats in state.history],
        }
        (fresh / STATE_FACTS).write_text(json.dumps(facts) + "\n")


def load_state(model: VAE, folder: str | os.PathLike[str]) -> TrainingState:
    """Put the saved weights into `model` and return the state that `fit` goes on from.

    Raises CheckpointError as `load` does.
    """
    folder = Path(folder)
    facts = _read_facts(folder / STATE_FACTS)
    device = next(model.parameters()).device
    tensors = _load_tensors(folder / STATE_TENSORS, facts.get("weights_sha256"), device)
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "optimizer": {}}
    for key, value in tensors.items():
        group, name = key.split("/", 1)
        groups[group][name] = value
    try:
        model.load_state_dict(groups["model"])
        names = {field.name for field in fields(EpochStats)}
        history = [
            EpochStats(**{key: row[key] for key in row if key in names}) for row in facts["history"]
        ]
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{folder} holds another model's training state: {error}") from error
    return TrainingState(
        epoch=facts["epoch"],
        best_bound=float("-inf") if facts["best_bound"] is None else facts["best_bound"],
        best_epoch=facts["best_epoch"],
        best_weights=groups["best"],
        optimizer=groups["optimizer"],
        history=history,
    )
