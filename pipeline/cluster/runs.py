"""Names and folders of Ray runs: the same command resumes its own run, a changed one never does.

A run is named by a hash of all that its result depends on: the parameters that the stage reads,
the prepared data's hash, the bytes of the stage's code (its deps in dvc.yaml) and the versions of
torch and ray. Scaling, tracking and terminal settings do not change results and are left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from pipeline.cluster.storage import Held, open_storage
from pipeline.stage import EXPERIMENT_VARIABLE, UserError
from pipeline.tracking import flatten, git_commit
from vae.system import listed

KEPT_RUNS = 5


def stage_hash(stage: str, content: Mapping[str, Any], dvc_file: Path = Path("dvc.yaml")) -> str:
    """Hash of `content` (parameters, data hash), the stage's code and the locked versions."""
    digest = hashlib.sha256()
    digest.update(json.dumps(content, sort_keys=True).encode())
    for package in ("torch", "ray"):
        digest.update(f"{package}=={version(package)}".encode())
    for path in _code_deps(stage, dvc_file):
        digest.update(str(path).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run_facts(
    stage: str, content_hash: str, data_hash: str, params: Mapping[str, Any]
) -> dict[str, Any]:
    """What run.json tells the tracker, but for the time at which the run finished."""
    return {
        "name": f"{stage}-{content_hash[:16]}",
        "experiment": os.environ.get(EXPERIMENT_VARIABLE),
        "started": time.time(),
        "params": flatten(params),
        "data_hash": data_hash,
        "stage_hash": content_hash,
        "git_commit": git_commit(),
    }


def _code_deps(stage: str, dvc_file: Path) -> list[Path]:
    deps = yaml.safe_load(dvc_file.read_text())["stages"][stage]["deps"]
    found: list[Path] = []
    for dep in deps:
        path = dvc_file.parent / dep
        if path.is_dir():
            found += listed(path, "**/*.py")
        elif path.suffix == ".py":
            found.append(path)
    return found


@dataclass(frozen=True)
class Run:
    """A run that this process holds.

    folder: for the driver's own files (epochs.jsonl). storage: where Ray keeps the run under its
    `name`, as `storage_path` takes it; the same as folder's parent unless that is s3://….
    """

    name: str
    folder: Path
    storage: str

    @property
    def address(self) -> str:
        return f"{self.storage}/{self.name}"


@contextmanager
def claim(stage: str, content_hash: str, storage: str | None) -> Iterator[Run]:
    """Yield this run, held by this process alone, and prune old runs of the stage.

    A killed `dvc repro` leaves its stage running; a second one must not write beside it.
    storage: `scaling.storage`. Raises UserError when another process holds the run.
    """
    place = open_storage(storage)
    name = f"{stage}-{content_hash[:16]}"
    try:
        with place.held(name):
            folder = place.home / name
            folder.mkdir(exist_ok=True)
            yield Run(name, folder, place.address)
            place.prune(f"{stage}-", KEPT_RUNS)
    except Held as holder:
        raise UserError(
            f"{holder} is still working on this {stage}; "
            "wait for it or end it, then run the same command again"
        ) from None
