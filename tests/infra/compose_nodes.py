"""The Ray head and worker of compose.yaml, as nodes of this machine."""

from __future__ import annotations

import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.infra.files import SECRETS, Service, run, service
from tests.pipeline.servers import PATIENCE_SECONDS, free_port, running

TOKEN = SECRETS["RAY_AUTH_TOKEN"]
# Several nodes on one machine need ports, folders and CPUs of their own; containers have them.
OWN_PORTS = (
    "dashboard-agent-grpc",
    "runtime-env-agent",
    "metrics-export",
    "node-manager",
    "object-manager",
)


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


@contextmanager
def running_nodes() -> Iterator[Nodes]:
    """The head and a worker while the block runs."""
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
