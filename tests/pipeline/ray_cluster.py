"""A Ray of their own for tests: started once, joined by address as a user's cluster is."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.pipeline.servers import free_port, wait_for

# What a node offers; GPUs that are none are enough for where trials are put.
RESOURCES = ("--num-cpus=2", "--num-gpus=1")


@contextmanager
def ray_node() -> Iterator[dict[str, str]]:
    """The variables with which a process joins a Ray that runs while the block does."""
    port = free_port()
    joined = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "token"}
    joined["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    folder = Path(tempfile.mkdtemp(prefix="tb-ray-", dir="/tmp"))  # sockets need a short path
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--port={port}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
    command += [*RESOURCES, "--include-dashboard=false", "--disable-usage-stats"]
    command += ["--object-store-memory=100000000"]
    log_file = folder / "log"
    with log_file.open("w") as log:
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | joined
        environment |= {"OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        wait_for(port, process, log_file)
        yield joined
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.Error):
                child.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
