"""A Ray cluster of several nodes on this machine: each a `ray start` of its own, to be killed."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import BIN, LONGEST_SECONDS
from tests.end_to_end.test_faults import children
from tests.pipeline.servers import free_port, wait_for

STARTS, SETTLED_SECONDS = 3, 3.0


class Node:
    """One `ray start --block`, with a temporary folder of its own, run by `wrapper`."""

    def __init__(
        self,
        options: list[str],
        environment: dict[str, str],
        num_cpus: int,
        wrapper: Sequence[str] = (),
    ) -> None:
        # Ray's sockets lie in there, and their paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="tb-", dir="/tmp"))
        ports = {
            "dashboard-agent-listen-port": free_port(),
            "metrics-export-port": free_port(),
        }
        self.log = self.folder / "log"
        command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats"]
        command += [f"--num-cpus={num_cpus}", f"--temp-dir={self.folder}"]
        command += ["--node-ip-address=127.0.0.1", f"--object-store-memory={128 * 2**20}"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*wrapper, *command, *options], stdout=log, stderr=log, env=environment
            )

    def stays_up(self) -> bool:
        """Whether it has started, and is still there a few seconds later."""
        started = 0.0
        while self.process.poll() is None:
            if not started and "Ray runtime started" in self.log.read_text():
                started = time.monotonic()
            if started and time.monotonic() - started > SETTLED_SECONDS:
                return True
            time.sleep(0.2)
        return False

    def below(self, title: str) -> list[psutil.Process]:
        """Processes of this node that have a title."""
        return children(self.process, title)

    def kill(self) -> None:
        """kill -9 of the raylet: the node is lost, with all that runs on it."""
        for raylet in self.below("raylet/raylet"):
            raylet.send_signal(signal.SIGKILL)
        self.stop()

    def stop(self) -> None:
        """End the node and all its processes, by kill -9: nothing of them is needed again."""
        node = psutil.Process(self.process.pid)
        with suppress(psutil.NoSuchProcess):
            for process in [*node.children(recursive=True), node]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Cluster:
    """A head and nodes that come and go, behind a token.

    address: of the cluster; dashboard: of its jobs API, where that is asked for. home: the home
    folder of its nodes. access: what a client needs; variables: what a driver on a node needs.
    """

    def __init__(self, folder: Path, num_cpus: int, dashboard: bool = False) -> None:
        folder.mkdir(exist_ok=True)
        self.home = folder
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if name != "RAY_ADDRESS" and not name.startswith(("AWS_", "MLFLOW_"))
        }
        own = {"PATH": path, "OMP_NUM_THREADS": "1", "HOME": str(folder)}
        self.environment |= access | own
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        self.access = access
        self.variables = access | {"RAY_ADDRESS": self.address}
        options = ["--head", f"--port={port}", f"--ray-client-server-port={free_port()}"]
        options += [f"--include-dashboard={str(dashboard).lower()}"]
        jobs_port = free_port()
        if dashboard:
            options += [f"--dashboard-port={jobs_port}"]
            self.dashboard = f"http://127.0.0.1:{jobs_port}"
        self.nodes = [Node(options, self.environment, num_cpus)]
        wait_for(port, self.nodes[0].process, self.nodes[0].log)
        if dashboard:
            wait_for(jobs_port, self.nodes[0].process, self.nodes[0].log)
        self.until_nodes(1)

    def add(self, num_cpus: int, wrapper: Sequence[str] = ()) -> Node:
        """A further node, run by a command; one whose raylet falls at its start is tried again, as
        whoever runs a cluster would. See `until_nodes`.
        """
        for _ in range(STARTS):
            node = Node([f"--address={self.address}"], self.environment, num_cpus, wrapper)
            if node.stays_up():
                self.nodes.append(node)
                return node
            node.stop()
        pytest.fail(f"a node did not start, {STARTS} times")

    def lose(self, node: Node) -> None:
        """A node dies, and doesn't come back."""
        node.kill()
        self.nodes.remove(node)

    def workers(self) -> int:
        """Workers of Ray Train that are there, on all nodes."""
        return sum(len(node.below("ray::RayTrainWorker")) for node in self.nodes)

    def until_nodes(self, count: int) -> None:
        """Wait until so many nodes are alive."""
        deadline = time.monotonic() + LONGEST_SECONDS
        while self._alive() != count:
            if time.monotonic() > deadline:
                logs = "\n".join(node.log.read_text() for node in self.nodes if node.log.exists())
                pytest.fail(f"{self._alive()} nodes instead of {count}:\n{logs}")
            time.sleep(0.5)

    def processes(self, title: str) -> list[psutil.Process]:
        """Processes of the nodes that have a title."""
        found = []
        for node in self.nodes:
            for process in psutil.Process(node.process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if title in " ".join(process.cmdline()):
                        found.append(process)
        return found

    def _alive(self) -> int:
        """Nodes that the head counts as alive, by Ray's own command."""
        done = subprocess.run(
            [str(BIN / "ray"), "status", f"--address={self.address}"],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        lines = done.stdout.partition("Active:")[2].partition("Pending:")[0].splitlines()
        return sum(" node_" in line for line in lines)

    def stop(self) -> None:
        for node in reversed(self.nodes):
            node.stop()
