"""A registered model on this machine: found by its MLflow address, loaded with its own code."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.stage import UserError, read_json
from pipeline.tracking import import_mlflow, store_address, without_password

REGISTERED = Path("reports/register.json")


@dataclass(frozen=True, kw_only=True)
class PackedModel:
    """A registered model's files.

    weights_hash names the model; columns and filled (what stands for missing values) are a
    table's; converts: its pictures were scaled or recoloured when they were prepared.
    """

    folder: Path
    weights_hash: str
    space: str
    data_shape: tuple[int, ...]
    num_samples: int
    columns: list[str] | None
    filled: dict[str, float] | None = None
    converts: bool = False


def champion_uri(register: Path = REGISTERED) -> str:
    """The address of the champion of the model that register.json names."""
    return f"models:/{read_json(register)['model_name']}@champion"


def fetch(uri: str, folder: Path) -> PackedModel:
    """Download the model at `uri` (models:/NAME@champion, models:/NAME/3, a folder) to `folder`.

    Raises UserError where there is none, or it is not one of ours.
    """
    mlflow = import_mlflow()
    address = _use_store()
    try:
        found = mlflow.artifacts.download_artifacts(uri, dst_path=str(folder))
    except Exception as error:  # MLflow's, its HTTP client's, the database's, the file system's
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"there is no model {uri} in MLflow's store at {without_password(address)} ({reason}); "
            "expected models:/NAME@champion, models:/NAME/VERSION or a model's folder; "
            "MLFLOW_TRACKING_URI names another store"
        ) from None
    return describe(Path(found))


def describe(folder: Path) -> PackedModel:
    """What a downloaded model says of itself; raises UserError unless it is one of ours."""
    artifacts = folder / "artifacts"
    try:
        config = json.loads((artifacts / "config.json").read_text())
        reference = json.loads((artifacts / "reference.json").read_text())
        data = json.loads((artifacts / "data.json").read_text())
        return PackedModel(
            folder=folder,
            weights_hash=config["weights_sha256"],
            space=config["model"]["space"],
            data_shape=tuple(config["model"]["data_shape"]),
            num_samples=int(reference["num_samples"]),
            columns=data["columns"],
            filled=data["filled"],
            converts=data["converts"],
        )
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{folder} is no model that `make run` registers ({type(error).__name__}: {error})"
        ) from None


def load(folder: Path) -> Any:
    """The pyfunc in `folder`, run by the code that was registered with it, not by today's.

    For a process of its own: the package `vae` is that code from here on.
    """
    mlflow = import_mlflow()
    for name in [name for name in sys.modules if name.partition(".")[0] == "vae"]:
        del sys.modules[name]
    return mlflow.pyfunc.load_model(str(folder))


def _use_store() -> str:
    """Point MLflow at the store that the environment, params.yaml or the folder names."""
    uri = None
    if Path("params.yaml").is_file():
        from pipeline.params import load_plain_params

        uri = load_plain_params().tracking.uri
    address = store_address(uri)
    mlflow = import_mlflow()
    mlflow.set_tracking_uri(address)
    mlflow.set_registry_uri(address)
    return address
