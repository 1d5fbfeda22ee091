"""A model on disk: weights.safetensors and config.json, read without pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vae.models.vae import VAE, VAEConfig
from vae.system import file_hash, whole_directory

WEIGHTS, CONFIG = "weights.safetensors", "config.json"


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
