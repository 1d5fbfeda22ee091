"""Real servers for tests, and a project folder to run in."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from pipeline.tracking import send

PATIENCE_SECONDS = 240


def mlflow_command(folder: Path, port: int) -> list[str]:
    """A tracking server with its database and artifacts in `folder`."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/m.db", "--workers", "1"]
    return [*command, "--artifacts-destination", str(folder / "artifacts")]


def free_port() -> int:
    """A TCP port on which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running(
    command: list[str],
    folder: Path,
    port: int,
    *,
    user: str | None = None,
    **variables: str,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server while the block runs, from the moment that it listens on `port`."""
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = os.environ | {"PATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | variables
    log_file = folder / "log"
    with log_file.open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            cwd=folder,
            env=environment,
            user=user,
            start_new_session=True,
        )
    try:
        wait_for(port, process, log_file)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(PATIENCE_SECONDS)


@contextmanager
def running_s3(bucket: str) -> Iterator[dict[str, str]]:
    """An S3 server with one bucket; the variables by which it is reached."""
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        address = "http://{}:{}".format(*server.get_host_and_port())
        urllib.request.urlopen(urllib.request.Request(f"{address}/{bucket}", method="PUT")).close()
        yield {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "me",
            "AWS_SECRET_ACCESS_KEY": "secret-of-s3",
        }
    finally:
        server.stop()


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


@contextmanager
def at_home(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make `folder` the project's, free of what the surroundings or an earlier test set."""

    patch.chdir(folder)
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_EXP_NAME"):
        patch.delenv(name, raising=False)
    send._store.cache_clear()
    send._warned.clear()
    yield
    send._store.cache_clear()
    send._warned.clear()
