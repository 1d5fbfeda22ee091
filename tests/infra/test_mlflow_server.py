"""The MLflow server of compose.yaml, by its own command and environment: PostgreSQL, users, S3."""

from __future__ import annotations

import base64
import os
import secrets
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from pipeline.submit import forwarded
from tests.infra.files import INFRA, Service, run, service, variables
from tests.pipeline import builders
from tests.pipeline.servers import at_home, free_port, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECRETS = {name: secrets.token_hex(32) for name in variables() if name != "VARIANT"}
PERSON, PASSWORD = "ada", secrets.token_hex(16)


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


EXPERIMENTS = "/api/2.0/mlflow/experiments/search?max_results=1"


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
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]["mlflow"]
    source, target, mode = compose["volumes"][0].split(":")
    assert (mlflow.environment["MLFLOW_AUTH_CONFIG_PATH"], mode) == (target, "ro")
    here = {"PGHOST": "127.0.0.1", "PGPORT": str(database)}
    return mlflow.environment | here | {"MLFLOW_AUTH_CONFIG_PATH": str(INFRA / source)}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
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
        folder = tmp_path_factory.mktemp("mlflow")
        stack.enter_context(running(mlflow.command, folder, port, **environment))
        assert run(mlflow.health).returncode == 0
        yield Server(f"http://127.0.0.1:{port}", s3)


@pytest.fixture(scope="module")
def person(server: Server) -> tuple[str, str]:
    """A user whom the admin made."""
    from mlflow.server import get_app_client

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", SECRETS["MLFLOW_ADMIN_PASSWORD"])
        client = get_app_client("basic-auth", server.address)
        made = client.create_user(PERSON, PASSWORD)
    assert (made.username, made.is_admin) == (PERSON, False)
    return PERSON, PASSWORD


def test_without_a_login_there_is_nothing_but_the_health_check(server: Server) -> None:
    assert server.status("/health") == 200
    assert server.status(EXPERIMENTS) == 401
    assert server.status("/") == 401
    assert server.status("/api/2.0/mlflow-artifacts/artifacts") == 401


def test_the_right_password_opens_and_no_other(server: Server, person: tuple[str, str]) -> None:
    assert server.status(EXPERIMENTS, user=person) == 200
    assert server.status(EXPERIMENTS, user=("admin", SECRETS["MLFLOW_ADMIN_PASSWORD"])) == 200
    for wrong in ((PERSON, "wrong"), ("admin", "password1234"), ("nobody", PASSWORD)):
        assert server.status(EXPERIMENTS, user=wrong) == 401


def test_another_host_name_is_refused(server: Server, person: tuple[str, str]) -> None:
    port = server.address.rpartition(":")[2]
    assert server.status(EXPERIMENTS, user=person, host=f"mlflow:{port}") == 200
    assert server.status(EXPERIMENTS, user=person, host="attacker.example") == 403


@pytest.fixture
def project(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project whose tracking address is the server's; no login is set."""
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    with at_home(tmp_path, monkeypatch):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        yield tmp_path


def test_the_pipeline_logs_and_registers_with_a_forwarded_login(
    server: Server, person: tuple[str, str], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    from pipeline import tracking
    from pipeline.register import register
    from pipeline.registry import Registry

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", PERSON)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    names = ["MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"]
    assert [name for name in forwarded(()) if name.startswith("MLFLOW_TRACKING")] == names

    params = builders.params()
    paths = builders.pipeline_outputs(project)
    result = register(params, paths)
    assert (result["version"], result["alias"]) == (1, "champion")
    registry = Registry(tracking.open_store(params), result["model_name"])
    run = registry.client.get_run(result["run_id"])
    assert run.data.metrics["test/log_px"] == result["log_px"]
    weights = (paths.model / "weights.safetensors").read_bytes()
    assert (registry.download(1, project / "back") / "weights.safetensors").read_bytes() == weights

    client = boto3.client(
        "s3", endpoint_url=server.s3, aws_access_key_id="any", aws_secret_access_key="any"
    )
    stored = client.list_objects_v2(Bucket="mlflow")["Contents"]
    assert any(entry["Key"].endswith("weights.safetensors") for entry in stored)


def test_without_a_login_training_goes_on_and_registration_says_why(project: Path) -> None:
    from pipeline import tracking
    from pipeline.register import register
    from pipeline.stage import UserError

    params = builders.params()
    paths = builders.pipeline_outputs(project)
    assert tracking.mirror_training(params, paths.train, paths.model, paths.sweep) is None
    with pytest.raises(UserError, match=r"401|authenticated"):
        register(params, paths)
