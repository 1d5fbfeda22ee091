"""Names and folders of Ray runs: the same command resumes its own run, a changed one never does.

A run is named by a hash of all that its result depends on: the parameters that the stage reads,
the prepared data's hash, the bytes of the stage's code (its deps in dvc.yaml) and the versions of
torch and ray. Scaling, tracking and terminal settings do not change results and are left out.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from pipeline.stage import UserError, project_root
from pipeline.store import flatten

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
        "started": time.time(),
        "params": flatten(params),
        "data_hash": data_hash,
        "stage_hash": content_hash,
    }


def _code_deps(stage: str, dvc_file: Path) -> list[Path]:
    deps = yaml.safe_load(dvc_file.read_text())["stages"][stage]["deps"]
    found: list[Path] = []
    for dep in deps:
        path = dvc_file.parent / dep
        if path.is_dir():
            found += sorted(path.rglob("*.py"))
        elif path.suffix == ".py":
            found.append(path)
    return found


def storage() -> Path:
    """Where Ray's runs live: `TIGHTBOUND_STORAGE`, else `.tightbound/ray` in the repository."""
    given = os.environ.get("TIGHTBOUND_STORAGE")
    return Path(given).resolve() if given else project_root() / ".tightbound" / "ray"


@contextmanager
def claim(stage: str, content_hash: str) -> Iterator[Path]:
    """Yield this run's folder, held by this process alone, and prune old runs of the stage.

    A killed `dvc repro` leaves its stage running; a second one must not write beside it.
    Raises UserError when another process holds the run.
    """
    folder = storage() / f"{stage}-{content_hash[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with (storage() / f"{folder.name}.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"process {lock.read().strip() or '?'} is still working on this {stage}; "
                "wait for it or end it, then run the same command again"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        os.utime(folder)
        yield folder
        _prune(stage)


def _prune(stage: str) -> None:
    folders = sorted(
        (path for path in storage().glob(f"{stage}-*") if path.is_dir()),
        key=lambda path: path.stat().st_mtime,
        reverse=True,
    )
    for path in folders[KEPT_RUNS:]:
        shutil.rmtree(path, ignore_errors=True)
        (path.parent / f"{path.name}.lock").unlink(missing_ok=True)
