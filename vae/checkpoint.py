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
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vae.files import file_hash, whole_directory
from vae.model import VAE, VAEConfig
from vae.training import EpochStats, TrainingState

WEIGHTS, CONFIG = "weights.safetensors", "config.json"
STATE_TENSORS, STATE_FACTS = "state.safetensors", "state.json"


class CheckpointError(ValueError):
    """A model or state on disk is missing, damaged, or was changed after it was written."""


def save(model: VAE, folder: str | os.PathLike[str]) -> None:
    """Write `model` into `folder`, whole or not at all; an existing folder is replaced."""
    with whole_directory(folder) as fresh:
        _save_tensors(dict(model.state_dict()), fresh / WEIGHTS)
        facts = {
            "format": 1,
            "weights_sha256": file_hash(fresh / WEIGHTS),
            "model": model.config.to_dict(),
        }
        (fresh / CONFIG).write_text(json.dumps(facts, indent=2) + "\n")


def load(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> VAE:
    """Read the model that `save` wrote, in evaluation mode.

    Raises CheckpointError when a file is missing or unreadable, or the weights are not those that
    were saved (by their SHA-256).
    """
    folder = Path(folder)
    facts = _read_facts(folder / CONFIG)
    tensors = _load_tensors(folder / WEIGHTS, facts.get("weights_sha256"), device)
    try:
        model = VAE(VAEConfig.from_dict(facts["model"]))
        dtype = tensors[next(name for name, _ in model.named_parameters())].dtype
        model.to(device=device, dtype=dtype).load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, StopIteration) as error:
        raise CheckpointError(f"{folder / CONFIG} does not describe {WEIGHTS}: {error}") from error
    return model.eval()


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


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    # Clones: safetensors refuses tensors that share memory, which state and model do.
    save_file({name: value.detach().cpu().clone() for name, value in tensors.items()}, path)
    path.chmod(0o644)


def _load_tensors(
    path: Path, expected_hash: str | None, device: torch.device | str
) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    found = file_hash(path)
    if found != expected_hash:
        raise CheckpointError(
            f"{path} is damaged or was changed: its SHA-256 is {found[:12]}…, "
            f"expected {str(expected_hash)[:12]}…"
        )
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path} holds {type(facts).__name__}; expected an object")
    return facts
