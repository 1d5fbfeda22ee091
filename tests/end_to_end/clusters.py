"""A Ray cluster of separate `ray start` processes on loopback, with token authentication."""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.end_to_end.conftest import BIN
from tests.pipeline.servers import free_port, wait_for

LOOPBACK = "127.0.0.1"
STOP_SECONDS = 60


@dataclass
class Cluster:
    """A running head; `environment` is what a driver or a client of the jobs API needs."""

    folder: Path
    port: int
    dashboard_port: int
    token: Path
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def dashboard(self) -> str:
        return f"http://{LOOPBACK}:{self.dashboard_port}"

    @property
    def client(self) -> dict[str, str]:
        """What a person sets at home."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}

    @property
    def driver(self) -> dict[str, str]:
        """What a driver on a node of the cluster sets."""
        return self.client | {"RAY_ADDRESS": f"{LOOPBACK}:{self.port}"}

    def start_node(
        self, *arguments: str, cpus: int, wrap: str = "{}", **environment: str
    ) -> subprocess.Popen[bytes]:
        """`ray start --block` in a session of its own; wrap: a shell command around it."""
        ports = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent")
        ports += ("metrics-export", "node-manager", "object-manager")
        command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats"]
        command += [f"--{name}-port={free_port()}" for name in ports]
        command += [f"--num-cpus={cpus}", f"--node-ip-address={LOOPBACK}", "--num-gpus=0"]
        command += ["--object-store-memory=200000000", *arguments]
        log = self.folder / f"node-{len(self.nodes)}.log"
        with log.open("w") as stream:
            node = subprocess.Popen(
                ["bash", "-c", "exec " + wrap.format(shlex.join(command))],
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
                env=self.surroundings() | environment,
                start_new_session=True,
            )
        self.nodes.append(node)
        return node

    def surroundings(self) -> dict[str, str]:
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "AWS_"))}
        own = {"PATH": path, "HOME": str(self.folder), "OMP_NUM_THREADS": "1"}
        return kept | self.client | own

    def stop(self) -> None:
        for node in reversed(self.nodes):
            if node.poll() is None:
                node.send_signal(signal.SIGTERM)
        for node in self.nodes:
            try:
                node.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()


@contextmanager
def running_cluster(cpus: int, **environment: str) -> Iterator[Cluster]:
    """A head node with its jobs API, for the length of the block."""
    # Ray's sockets lie below its folder, and a socket's path may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="tb-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        cluster = Cluster(folder, free_port(), free_port(), token)
        head = cluster.start_node(
            "--head",
            f"--port={cluster.port}",
            f"--dashboard-port={cluster.dashboard_port}",
            f"--ray-client-server-port={free_port()}",
            f"--temp-dir={folder / 'ray'}",
            cpus=cpus,
            **environment,
        )
        try:
            wait_for(cluster.dashboard_port, head, folder / "node-0.log")
            time.sleep(2)  # the agent that starts jobs comes a little later
            yield cluster
        finally:
            cluster.stop()
