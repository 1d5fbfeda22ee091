"""The Ray head and worker of compose.yaml, by their own commands, environment and health checks."""

from __future__ import annotations

import secrets
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.infra.files import Service, run, service, variables
from tests.pipeline.servers import PATIENCE_SECONDS, free_port, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECRETS = {name: secrets.token_hex(32) for name in variables() if name != "VARIANT"}
TOKEN = SECRETS["RAY_AUTH_TOKEN"]
# Several nodes on one machine need ports, folders and CPUs of their own; containers have them.
OWN_PORTS = (
    "dashboard-agent-grpc",
    "runtime-env-agent",
    "metrics-export",
    "node-manager",
    "object-manager",
)
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


@dataclass(frozen=True)
class Nodes:
    """A running head and worker."""

    head: Service
    worker: Service
    gcs: int
    dashboard: int

    def jobs_status(self, token: str | None) -> int:
        """The HTTP status of the jobs API."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.dashboard}/api/jobs/")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code


def on_this_machine(node: Service, folder: Path, agent: int) -> list[str]:
    own = [f"--{name}-port={free_port()}" for name in OWN_PORTS]
    own += [f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}"]
    own += ["--node-ip-address=127.0.0.1", "--num-cpus=1", "--num-gpus=0"]
    return [*node.command, *own, "--object-store-memory=100000000"]


def healthy(node: Service, **environment: str) -> bool:
    """Whether its health check, repeated as Compose does, succeeds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if run(node.health, **environment).returncode == 0:
            return True
        time.sleep(1)
    return False


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    gcs, dashboard, agents = free_port(), free_port(), (free_port(), free_port())
    there = {"6379": str(gcs), "8265": str(dashboard), "ray-head": "127.0.0.1"}
    head = service("ray-head", SECRETS, there)
    worker = service("ray-worker", SECRETS, there | {"52365": str(agents[1])})
    with ExitStack() as stack:
        for node, agent, port in ((head, agents[0], gcs), (worker, agents[1], agents[1])):
            # Ray's sockets lie below its folder, and their paths must be short.
            folder = Path(
                stack.enter_context(tempfile.TemporaryDirectory(prefix="tb-", dir="/tmp"))
            )
            command = on_this_machine(node, folder / "ray", agent)
            if node is head:
                command.append(f"--ray-client-server-port={free_port()}")
            stack.enter_context(running(command, folder, port, **node.environment))
            assert healthy(node, **node.environment), (folder / "log").read_text()
        yield Nodes(head, worker, gcs, dashboard)


def test_the_worker_joins_the_head(nodes: Nodes) -> None:
    done = run(["ray", "status", f"--address=127.0.0.1:{nodes.gcs}"], **nodes.head.environment)
    active = done.stdout.partition("Active:")[2].partition("Pending:")[0]
    assert active.count(" node_") == 2
    assert "/2.0 CPU" in done.stdout


def test_the_jobs_api_opens_with_the_token_alone(nodes: Nodes) -> None:
    assert nodes.jobs_status(TOKEN) == 200
    assert nodes.jobs_status(None) == 401
    assert nodes.jobs_status(secrets.token_hex(32)) == 403


def test_another_token_joins_no_node_and_finds_no_cluster(nodes: Nodes) -> None:
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
