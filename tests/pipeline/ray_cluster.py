"""A Ray of their own for tests: started once, joined by address as a user's cluster is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.pipeline.servers import PATIENCE_SECONDS, free_port, wait_for

# What a node offers; GPUs that are none are enough for where trials are put.
RESOURCES = ("--num-cpus=2", "--num-gpus=1")


def until_started(process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the node is there, some time after its port; fail with the log if it ends."""
    start = time.monotonic()
    while "Ray runtime started" not in log.read_text():
        if process.poll() is not None or time.monotonic() - start > PATIENCE_SECONDS:
            pytest.fail(f"no Ray node:\n{log.read_text()}")
        time.sleep(0.1)


@contextmanager
def ray_node() -> Iterator[dict[str, str]]:
    """The variables with which a process joins a Ray that runs while the block does."""
    port = free_port()
    # The user's own token, made where there is none: a process that has read one keeps it.
    joined = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "token"}
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    subprocess.run([*ray, "get-auth-token", "--generate"], check=True, capture_output=True)
    folder = Path(tempfile.mkdtemp(prefix="tb-ray-", dir="/tmp"))  # sockets need a short path
    command = [*ray, "start", "--head", "--block"]
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
        until_started(process, log_file)
        yield joined
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.Error):
                child.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
