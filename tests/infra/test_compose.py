"""What compose.yaml starts, by its own commands, environments and health checks."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.launch import forwarded
from pipeline.stage import read_json
from pipeline.tracking import send
from tests.end_to_end.conftest import Project
from tests.infra.compose_nodes import TOKEN, Nodes, running_nodes
from tests.infra.compose_servers import Server, running_server
from tests.infra.files import INFRA, SECRETS, run
from tests.pipeline import builders
from tests.pipeline.servers import at_home, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PERSON, PASSWORD = "ada", secrets.token_hex(16)
README = (INFRA / "README.md").read_text()
PINNED = {
    "model.latent_dim": 2,
    "model.likelihood": "discretized_logistic",
    "training.epochs": 2,
}
EXPERIMENTS = "/api/2.0/mlflow/experiments/search?max_results=1"
# What each node of a cluster knows of the S3 store, as a job sees it.
PROGRAM = """
import os, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

ray.init(log_to_driver=False)
read = ray.remote(num_cpus=1)(lambda: [os.environ.get(name) for name in NAMES])
NAMES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "TIGHTBOUND_STORAGE")
nodes = [node["NodeID"] for node in ray.nodes()]
found = [ray.get(read.options(scheduling_strategy=On(node, soft=False)).remote()) for node in nodes]
print("found", len(nodes), all(values == [os.environ[n] for n in NAMES] for values in found))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("mlflow")) as found:
        yield found


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes() as found:
        yield found


@pytest.fixture(scope="module")
def person(server: Server) -> tuple[str, str]:
    """A user whom the admin made, by the README's command."""
    (program,) = re.findall(r"python -c '\n(import getpass.*?)'$", README, re.DOTALL | re.MULTILINE)
    admin = {
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": SECRETS["MLFLOW_ADMIN_PASSWORD"],
    }
    done = subprocess.run(
        [sys.executable, "-c", program.replace("http://mlflow:5000", server.address)],
        env=os.environ | admin,
        input=f"{PERSON}\n{PASSWORD}\n",
        capture_output=True,
        text=True,
        start_new_session=True,  # without a terminal the password is read from standard input
    )
    assert done.returncode == 0, done.stderr
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


def stored(server: Server, bucket: str) -> list[str]:
    """The names of all objects."""
    import boto3

    keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any"}
    client = boto3.client("s3", endpoint_url=server.s3, region_name="us-east-1", **keys)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


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
    from pipeline.register import Registry, register

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", PERSON)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    names = ["MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"]
    assert [name for name in forwarded(()) if name.startswith("MLFLOW_TRACKING")] == names

    params = builders.params()
    paths = builders.pipeline_outputs(project)
    result = register(params, paths)
    assert (result["version"], result["alias"]) == (1, "champion")
    registry = Registry(send.open_store(params), result["model_name"])
    run = registry.client.get_run(result["run_id"])
    assert run.data.metrics["test/log_px"] == result["log_px"]
    weights = (paths.model / "weights.safetensors").read_bytes()
    assert (registry.download(1, project / "back") / "weights.safetensors").read_bytes() == weights

    assert any(key.endswith("weights.safetensors") for key in stored(server, "mlflow"))


def test_a_colleague_works_on_it_once_let_in(
    server: Server, person: tuple[str, str], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.server import get_app_client

    from pipeline.register import Registry, register
    from pipeline.stage import UserError

    def log_in(name: str, password: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    params = builders.params()
    log_in(PERSON, PASSWORD)
    first = register(params, builders.pipeline_outputs(project / "first"))
    registry = Registry(send.open_store(params), first["model_name"])
    client = get_app_client("basic-auth", server.address)
    log_in("admin", SECRETS["MLFLOW_ADMIN_PASSWORD"])
    client.create_user("grace", PASSWORD)

    log_in("grace", PASSWORD)
    paths = builders.pipeline_outputs(project / "second", name="train-0002", seed=1)
    with pytest.raises(UserError, match=r"403|denied"):
        register(params, paths)
    log_in(PERSON, PASSWORD)
    grants = re.findall(r"^client\.grant_user_permission\(.*\)$", README, re.MULTILINE)
    experiment = registry.client.get_run(first["run_id"]).info.experiment_id
    for grant in grants:
        here = grant.replace('"1"', f'"{experiment}"')
        eval(here.replace("tightbound-mnist5k-grey8", registry.name), {"client": client})
    log_in("grace", PASSWORD)
    second = register(params, paths)
    assert second["version"] == first["version"] + 1
    registry.promote(second["version"])
    registry.promote(first["version"])
    assert registry.alias("champion") == first["version"]


def test_without_a_login_training_goes_on_and_registration_says_why(project: Path) -> None:
    from pipeline.register import register
    from pipeline.stage import UserError
    from pipeline.tracking import mirror as tracking

    params = builders.params()
    paths = builders.pipeline_outputs(project)
    assert tracking.mirror_training(params, paths.train, paths.model, paths.sweep) is None
    with pytest.raises(UserError, match=r"401|authenticated"):
        register(params, paths)


def test_the_worker_joins_the_head(nodes: Nodes) -> None:
    done = run(["ray", "status", f"--address=127.0.0.1:{nodes.gcs}"], **nodes.head.environment)
    active = done.stdout.partition("Active:")[2].partition("Pending:")[0]
    assert active.count(" node_") == 2
    assert "/2.0 CPU" in done.stdout


def test_the_jobs_api_opens_with_the_token_alone(nodes: Nodes) -> None:
    assert nodes.jobs_status(TOKEN) == 200
    assert nodes.jobs_status(None) == 401
    assert nodes.jobs_status(secrets.token_hex(32)) == 403


def test_another_token_finds_no_cluster(nodes: Nodes) -> None:
    other = nodes.head.environment | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    assert run(nodes.head.health, **nodes.head.environment).returncode == 0
    assert run(nodes.head.health, **other).returncode != 0


def test_without_a_token_ray_does_not_start(nodes: Nodes, tmp_path: Path) -> None:
    empty = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
    done = run(["ray", "start", "--head", f"--port={free_port()}"], **empty)
    assert done.returncode != 0
    assert "token" in done.stderr.lower() + done.stdout.lower()


def test_a_job_runs_with_the_nodes_environment(nodes: Nodes) -> None:
    """It reaches both nodes, and has the store's credentials without anybody forwarding them."""
    address = f"--address=http://127.0.0.1:{nodes.dashboard}"
    command = ["ray", "job", "submit", address, "--", "python", "-c", PROGRAM]
    done = run(command, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert "found 2 True" in done.stdout, done.stdout + done.stderr


def test_the_pipeline_on_that_cluster_comes_home(
    server: Server, person: tuple[str, str], nodes: Nodes, tmp_path: Path
) -> None:
    """As the README has it: an uploaded copy, results through S3, the model registered."""
    project = Project.create(tmp_path / "project")
    project.change(PINNED)
    project.environment |= {
        "MLFLOW_TRACKING_URI": server.address,
        "MLFLOW_TRACKING_USERNAME": PERSON,
        "MLFLOW_TRACKING_PASSWORD": PASSWORD,
        "AWS_ACCESS_KEY_ID": SECRETS["S3_ACCESS_KEY"],
        "AWS_SECRET_ACCESS_KEY": SECRETS["S3_SECRET_KEY"],
        "AWS_ENDPOINT_URL": server.s3,
        "AWS_DEFAULT_REGION": "us-east-1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
    }
    (remote,) = re.findall(r"^dvc remote add .*$", README, re.MULTILINE)
    project.run(*remote.split())
    address = f"http://127.0.0.1:{nodes.dashboard}"
    said = project.run("python", "-m", "pipeline.launch.submit", "--address", address)
    assert not any(secret in said for secret in (*SECRETS.values(), PASSWORD))
    assert "up to date" in project.run("dvc", "status")
    result = read_json(project.folder / "reports" / "register.json")
    assert (result["alias"], result["tracking_uri"]) == ("champion", server.address)
    kept = [key for bucket in ("mlflow", "tightbound") for key in stored(server, bucket)]
    for pattern in ("^dvc/files/md5/", r"^ray/train-.*/state\.safetensors$", r"/elbo_curves\.png$"):
        assert any(re.search(pattern, key) for key in kept), pattern
