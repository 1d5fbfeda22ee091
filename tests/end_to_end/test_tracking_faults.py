"""An MLflow server that is down, dies, fails or hangs: the training neither waits nor loses."""

from __future__ import annotations

import os
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest

from pipeline.tracking import EPOCH_METRICS
from tests.end_to_end.conftest import EPOCHS, LONGEST_SECONDS, Project, finish
from tests.end_to_end.test_faults import epochs_logged, until
from tests.pipeline.servers import free_port, mlflow_command, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LONGEST_SECONDS)]

# From the last epoch to the end: 10 s for what is queued, and what Ray takes to end on a machine
# under load. One call to a dead server at MLflow's own settings takes 247 s.
ENDING_SECONDS = 120
ERROR = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Front(socketserver.ThreadingTCPServer):
    """Stands before a server; what comes in is passed on, answered with 500, or never answered."""

    daemon_threads = True
    way: ClassVar[str] = "pass"

    def __init__(self, behind: int) -> None:
        super().__init__(("127.0.0.1", 0), Connection)
        self.behind = behind
        self.over = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Connection(socketserver.BaseRequestHandler):
    @property
    def front(self) -> Front:
        assert isinstance(self.server, Front)
        return self.server

    def handle(self) -> None:
        with (
            suppress(OSError),
            socket.create_connection(("127.0.0.1", self.front.behind)) as back,
        ):
            answers = threading.Thread(target=self.pass_on, args=(back, self.request), daemon=True)
            answers.start()
            self.pass_on(self.request, back)

    def pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self.front.way == "500":
                    self.request.sendall(ERROR)
                    return
                if self.front.way == "hang":
                    self.front.over.wait()
                target.sendall(data)


class Tracking:
    """A real MLflow server behind a front."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.stack = ExitStack()
        self.start()
        self.front = Front(self.port)

    def start(self) -> None:
        command = mlflow_command(self.folder, self.port)
        self.process = self.stack.enter_context(running(command, self.folder, self.port))

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.stack.close()

    def stop(self) -> None:
        self.front.over.set()
        self.front.shutdown()
        self.front.server_close()
        self.stack.close()


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    tracking = Tracking(tmp_path_factory.mktemp("server"))
    yield tracking
    tracking.stop()


FAULTS = [
    ("is down", "start"),
    ("is killed", "middle"),
    ("answers 500", "start"),
    ("hangs", "start"),
    ("hangs", "middle"),
]


@pytest.mark.parametrize(("fault", "moment"), FAULTS)
def test_training_ends_and_a_sync_brings_everything(
    fault: str, moment: str, pinned: Project, tracking: Tracking, tmp_path: Path
):
    project = pinned.copy(tmp_path)
    experiment = f"{fault} {moment}"
    address = f"http://127.0.0.1:{tracking.front.server_address[1]}"
    project.change({"tracking.uri": address, "tracking.experiment": experiment})
    process = None
    if moment == "middle":
        process = project.start(*project.stage_command("train"))
        until(lambda: len(epochs_logged(project)) >= 3, process)
    if fault.startswith("is "):
        tracking.kill()
    Front.way = {"answers 500": "500", "hangs": "hang"}.get(fault, "pass")
    output = finish(process or project.start(*project.stage_command("train")))
    ended = time.time()
    history = pd.read_csv(project.folder / "reports" / "train" / "history.csv")
    assert history["epoch"].tolist() == list(range(1, EPOCHS + 1))
    assert ended - history["time"].tolist()[-1] < ENDING_SECONDS
    assert output.count("warning: ") == 1, output
    assert f"warning: MLflow at {address} was not reached" in output

    if fault.startswith("is "):
        tracking.start()
    Front.way = "pass"
    project.run(sys.executable, "-m", "pipeline.tracking", "--sync")
    check_is_whole(address, experiment, history)


def check_is_whole(address: str, experiment: str, history: pd.DataFrame) -> None:
    """The model's run has each epoch's figures once, and its files; the sweep's is there."""
    from mlflow import MlflowClient

    client = MlflowClient(address, address)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = {
        run.data.tags["tightbound.kind"]: run for run in client.search_runs([found.experiment_id])
    }
    run = runs["model"]
    assert run.data.tags["sweep_run_id"] == runs["sweep"].info.run_id
    assert run.info.status == "FINISHED"
    for column, metric in EPOCH_METRICS.items():
        points = client.get_metric_history(run.info.run_id, metric)
        assert len(points) == len(history)
        expected = dict(zip(history["epoch"], history[column], strict=True))
        assert {point.step: point.value for point in points} == pytest.approx(expected)
    files = [entry.path for entry in client.list_artifacts(run.info.run_id, "train")]
    assert files == ["train/history.csv", "train/metrics.json"]
