"""The pipeline as a job on a real cluster, by the shared folder and by the uploaded copy."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml

from tests.end_to_end.conftest import BUCKET, LONGEST_SECONDS, Project, finish
from tests.end_to_end.nodes import Cluster
from tests.pipeline.servers import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LONGEST_SECONDS)]

SECRETS = {"AWS_SECRET_ACCESS_KEY": "secret-of-s3", "SERVICE_TOKEN": "secret-of-the-service"}
# Data that nobody gets without the token.
LOADER = """
import os
import numpy as np

def load(root):
    assert os.environ["SERVICE_TOKEN"]
    z = np.random.default_rng(0).normal(size=(300, 1))
    return {"x": z + np.random.default_rng(1).normal(size=(300, 3)), "columns": ["a", "b", "c"]}
"""
TABLE = {
    "data.source": "service:load",
    "data.space": "continuous",
    "model.latent_dim": 1,
    "model.likelihood": "gaussian",
    "training.epochs": 5,
    "training.patience": None,
    "submit.forward": ["SERVICE_TOKEN"],
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), num_cpus=2, dashboard=True)
    try:
        yield cluster
    finally:
        cluster.stop()


class Laptop(Project):
    """A project whose own machine is no node of the cluster."""

    cluster: Cluster

    @classmethod
    def beside(cls, cluster: Cluster, folder: Path) -> Laptop:
        laptop = cls.create(folder)
        assert isinstance(laptop, Laptop)
        laptop.cluster = cluster
        laptop.environment |= cluster.access | SECRETS
        (folder / "data" / "own" / "service.py").write_text(LOADER)
        laptop.change(TABLE)
        return laptop

    def submit(self, *options: str) -> subprocess.Popen[str]:
        command = (
            sys.executable,
            "-m",
            "pipeline.launch.submit",
            "--address",
            self.cluster.dashboard,
        )
        return self.start(*command, *options)

    def is_clean(self, *stages: str) -> bool:
        return self.run("dvc", "status", *stages) == "Data and pipelines are up to date.\n"

    def history(self) -> pd.DataFrame:
        return pd.read_csv(self.folder / "reports" / "train" / "history.csv")


def read_until(process: subprocess.Popen[str], pattern: str) -> tuple[str, str]:
    """What a process prints up to a line that matches, and the match's first group."""
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if found := re.search(pattern, line):
            return seen, found[1]
    pytest.fail(f"it ended before {pattern!r}:\n{seen}")


def test_in_a_shared_folder(cluster: Cluster, tmp_path: Path):
    """A second submission is refused; the follower is killed, and another brings it to its end."""
    laptop = Laptop.beside(cluster, tmp_path)
    laptop.change({"submit.folder": str(tmp_path), "submit.python": sys.executable})
    laptop.commit("in the cluster's folder")
    follower = laptop.submit()
    told, job = read_until(follower, r"job (tightbound-\S+): `make submit JOB=")
    told += read_until(follower, r"^(prepare)")[0]
    refused = finish(laptop.submit(), expect=1)
    assert f"error: job {job} is at work on this already" in refused
    assert f"make submit JOB={job}" in refused
    follower.send_signal(signal.SIGKILL)
    follower.communicate()
    followed = finish(laptop.submit("--job", job))
    assert [line.split()[0] for line in followed.splitlines()][-1] == "report"
    for stage in ("prepare", "selfcheck", "sweep", "train", "evaluate", "register"):
        assert re.search(rf"^{stage} ", followed, re.MULTILINE), followed
    assert "Traceback" not in followed
    assert laptop.is_clean()
    assert laptop.history()["epoch"].tolist() == [1, 2, 3, 4, 5]
    assert (tmp_path / "reports" / "report.html").stat().st_size > 100_000
    assert not any(secret in told + followed for secret in SECRETS.values())


def test_another_folder_is_refused_by_the_job(cluster: Cluster, tmp_path: Path):
    laptop = Laptop.beside(cluster, tmp_path / "here")
    (tmp_path / "there").mkdir()
    laptop.copy(tmp_path / "there")
    laptop.change({"submit.folder": str(tmp_path / "there")})
    output = finish(laptop.submit(), expect=1)
    assert f"{tmp_path / 'there'} on the cluster is not the folder" in output
    assert "failed with exit code 1" in output


def test_an_uploaded_copy(cluster: Cluster, s3: dict[str, str], tmp_path: Path):
    """Left by Ctrl-C, cancelled while it trains, and submitted again: it goes on from there."""
    laptop = Laptop.beside(cluster, tmp_path)
    laptop.environment |= s3 | {"MLFLOW_TRACKING_URI": f"sqlite:///{cluster.home}/mlflow.db"}
    laptop.run("dvc", "remote", "add", "--default", "team", f"s3://{BUCKET}/dvc")
    epochs = 1000
    laptop.change({"training.epochs": epochs})
    laptop.commit("an uploaded copy")

    follower = laptop.submit()
    told, job = read_until(follower, r"job (tightbound-\S+): `make submit JOB=")
    names = re.search(r"forwarding (.*)", told)
    assert names is not None
    wanted = {"MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", *SECRETS}
    assert wanted <= set(names[1].split(", "))
    refused = finish(laptop.submit(), expect=1)
    assert f"error: job {job} is at work on this already" in refused
    told += read_until(follower, r"^train .* epoch +(\d+)")[0]
    follower.send_signal(signal.SIGINT)
    left = finish(follower, expect=130)
    assert f"job {job} goes on without this terminal; `make submit JOB={job}`" in left
    assert "Traceback" not in left

    lock = tmp_path / "dvc.lock"
    lock.write_text("of somebody else")
    cancelled = finish(laptop.submit("--cancel", job), expect=1)
    ended = time.time()
    assert "dvc.lock has changed here since the job was submitted, and was left alone" in cancelled
    assert lock.read_text() == "of somebody else"
    aside = tmp_path / ".tightbound" / "submitted" / f"{job}.dvc.lock"
    assert f"the job's is {aside.relative_to(tmp_path)}" in cancelled
    lock.unlink()
    cancelled += finish(laptop.submit("--cancel", job), expect=1)
    assert f"job {job} was cancelled; what it finished is here" in cancelled
    assert processes_of(job) == []
    assert lock.read_text() == aside.read_text()
    assert set(yaml.safe_load(lock.read_text())["stages"]) == {"prepare", "selfcheck", "sweep"}
    assert laptop.is_clean("prepare", "selfcheck", "sweep")

    laptop.commit("what the first job finished")
    again = finish(laptop.submit())
    assert not re.search(r"^(prepare|selfcheck|sweep) ", again, re.MULTILINE), again
    assert laptop.is_clean()
    history = laptop.history()
    assert history["epoch"].tolist() == list(range(1, epochs + 1))
    assert history["time"].iloc[0] < ended < history["time"].iloc[-1]
    assert not any(secret in told + left + cancelled + again for secret in SECRETS.values())

    result = json.loads((tmp_path / "reports" / "register.json").read_text())
    assert (result["verdict"], result["version"]) == ("champion", 1)
    assert not (tmp_path / ".tightbound" / "ray").exists()  # nothing was trained here


def processes_of(job: str) -> list[str]:
    """Command lines of what still runs for a job."""
    found = []
    for process in psutil.process_iter():
        try:
            if job in json.dumps(process.environ()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def test_no_cluster_and_a_wrong_token_are_told(cluster: Cluster, tmp_path: Path):
    laptop = Laptop.beside(cluster, tmp_path)
    laptop.environment["RAY_AUTH_TOKEN"] = "0" * 64
    output = finish(laptop.submit("--job", "tightbound-1"), expect=1)
    assert "refused the token; expected its own in RAY_AUTH_TOKEN" in output
    del laptop.environment["RAY_AUTH_TOKEN"]
    output = finish(laptop.submit("--job", "tightbound-1"), expect=1)
    assert f"the cluster at {cluster.dashboard} has no job tightbound-1" in output
    nowhere = f"http://127.0.0.1:{free_port()}"
    laptop.environment["RAY_API_SERVER_ADDRESS"] = nowhere
    output = laptop.run(sys.executable, "-m", "pipeline.launch.submit", expect=1)
    assert f"no Ray cluster answers at {nowhere}" in output
