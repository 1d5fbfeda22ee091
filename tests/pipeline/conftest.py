"""What tests of tracking and registration share."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.pipeline.builders import free_port

PATIENCE_SECONDS = 240


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's empty database; copying it is much faster than its migrations."""
    from pipeline.store import Store

    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        Store(f"sqlite:///{path}", "Default")
    return path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[str]:
    """The address of a real MLflow server with a database of its own."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "m.db")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/m.db", "--workers", "1"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with running(command, folder, port):
        yield address


@contextmanager
def running(command: list[str], folder: Path, port: int) -> Iterator[None]:
    """Run a server while the block runs, from the moment that it listens on `port`."""
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = os.environ | {"PATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    log_file = folder / "log"
    with log_file.open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True
        )
    try:
        wait_for(port, process, log_file)
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once something listens on `port`; fail with the log if the process ends before."""
    start = time.monotonic()
    while time.monotonic() - start < PATIENCE_SECONDS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on port {port}:\n{log.read_text()}")


@pytest.fixture
def project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path
) -> Iterator[Path]:
    """An empty project folder with a database of its own."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    with at_home(tmp_path, monkeypatch):
        yield tmp_path


@contextmanager
def at_home(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make `folder` the project's, free of what the surroundings or an earlier test set."""
    from pipeline import tracking

    patch.chdir(folder)
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_EXP_NAME"):
        patch.delenv(name, raising=False)
    tracking._store.cache_clear()
    tracking._warned.clear()
    yield
    tracking._store.cache_clear()
    tracking._warned.clear()
