"""The MLflow server of compose.yaml with what it needs: PostgreSQL, and moto's server for S3."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.infra.files import INFRA, SECRETS, Service, load, run, service
from tests.pipeline.servers import free_port, running


@dataclass(frozen=True)
class Server:
    """A running MLflow server and the S3 store behind it."""

    address: str
    s3: str

    def status(self, path: str, *, host: str | None = None, user: tuple[str, str] | None = None):
        """The HTTP status of a GET."""
        request = urllib.request.Request(f"{self.address}{path}")
        if host:
            request.add_header("Host", host)
        if user:
            login = base64.b64encode(":".join(user).encode()).decode()
            request.add_header("Authorization", f"Basic {login}")
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code


def postgres(stack: ExitStack, content: dict[str, str]) -> int:
    """The port of a PostgreSQL server with the user, password and database of compose.yaml."""
    binaries = shutil.which("initdb")
    if binaries is None:
        pytest.skip("no PostgreSQL here: initdb is not on the path")
    name = stack.enter_context(tempfile.TemporaryDirectory(prefix="tb-pg-", dir="/tmp"))
    folder = Path(name)
    password = folder / "password"
    password.write_text(content["POSTGRES_PASSWORD"])
    user = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
    if user:
        for path in (folder, password):
            shutil.chown(path, user)
    data, port = folder / "data", free_port()
    initialise = ["initdb", "-D", str(data), "-U", content["POSTGRES_USER"]]
    initialise += ["--auth=scram-sha-256", f"--pwfile={password}", "--no-sync"]
    subprocess.run(initialise, cwd=folder, user=user, check=True, capture_output=True)
    serve = ["postgres", "-D", str(data), "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    serve += ["-c", f"unix_socket_directories={folder}"]
    stack.enter_context(running(serve, folder, port, user=user))
    login = {"PGPASSWORD": content["POSTGRES_PASSWORD"]}
    create = ["createdb", "-h", "127.0.0.1", "-p", str(port), "-U", content["POSTGRES_USER"]]
    create += [content["POSTGRES_DB"]]
    assert run(create, **login).returncode == 0
    return port


def on_this_machine(mlflow: Service, port: int, database: int) -> dict[str, str]:
    """The server's environment, its configuration and database where they are here."""
    compose = load("compose.yaml")["services"]["mlflow"]
    source, target, mode = compose["volumes"][0].split(":")
    assert (mlflow.environment["MLFLOW_AUTH_CONFIG_PATH"], mode) == (target, "ro")
    here = {"PGHOST": "127.0.0.1", "PGPORT": str(database)}
    return mlflow.environment | here | {"MLFLOW_AUTH_CONFIG_PATH": str(INFRA / source)}


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """S3 store, buckets, PostgreSQL and the MLflow server (in `folder`) while the block runs."""
    from moto.server import ThreadedMotoServer

    with ExitStack() as stack:
        store = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        store.start()
        stack.callback(store.stop)
        s3 = "http://{}:{}".format(*store.get_host_and_port())
        buckets = service("buckets", SECRETS, {"http://s3:7070": s3})
        for _ in range(2):  # the second time they are there
            made = run(buckets.command, **buckets.environment)
            assert made.returncode == 0, made.stderr
        database = postgres(stack, service("postgres", SECRETS).environment)
        port = free_port()
        mlflow = service("mlflow", SECRETS, {"http://s3:7070": s3, "5000": str(port)})
        environment = on_this_machine(mlflow, port, database)
        stack.enter_context(running(mlflow.command, folder, port, **environment))
        assert run(mlflow.health).returncode == 0
        yield Server(f"http://127.0.0.1:{port}", s3)
