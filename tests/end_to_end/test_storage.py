"""Two nodes without a common folder: checkpoints on S3, and a folder that only one node has."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pyarrow import fs

from tests.end_to_end.conftest import BUCKET, LONGEST_SECONDS, REPOSITORY, Project, finish
from tests.end_to_end.nodes import Cluster
from tests.end_to_end.test_faults import epochs_logged, kill, trials, until
from tests.end_to_end.test_submit import read_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LONGEST_SECONDS)]

EPOCHS = 200
PINNED = {
    "model.latent_dim": 2,
    "model.likelihood": "discretized_logistic",
    "training.epochs": EPOCHS,
    "training.patience": None,
    "data.limit": 2000,
}
# Pictures, of which so few are decoded by this machine's own threads otherwise.
DECODE = """
import sys
from pathlib import Path
from pipeline.prepare.sources import folder
from tests.pipeline.builders import DATA
from dataclasses import replace

folder.RAY_FILES = 1
found = folder.load(replace(DATA, source="folder", root=sys.argv[1]), Path(sys.argv[2]))
print(found.x.sum(), len(found.x))
"""


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks different from each node."""
    return tmp_path_factory.mktemp("own")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, own_folder: Path) -> Iterator[Cluster]:
    """A head and a node of one CPU each; the node has a mount of its own over `own_folder`."""
    mounting = 'mount -t tmpfs none "$0" && exec "$@"'
    wrapper = ["unshare", "--mount", "sh", "-c", mounting, str(own_folder)]
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), num_cpus=1)
    try:
        cluster.add(num_cpus=1, wrapper=wrapper)
        cluster.until_nodes(2)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def ready(
    tmp_path_factory: pytest.TempPathFactory, cluster: Cluster, s3: dict[str, str]
) -> Project:
    """A project on a node of the cluster, ready to train; the nodes know nothing of S3."""
    project = Project.create(tmp_path_factory.mktemp("ready"))
    project.change(PINNED)
    for stage in ("prepare", "selfcheck"):
        project.stage(stage)
    project.stage("sweep")
    project.environment |= cluster.variables | s3
    return project


def bucket(s3: dict[str, str]) -> fs.S3FileSystem:
    return fs.S3FileSystem(
        access_key=s3["AWS_ACCESS_KEY_ID"],
        secret_key=s3["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=s3["AWS_ENDPOINT_URL"],
    )


def in_bucket(s3: dict[str, str], pattern: str) -> list[str]:
    """Names in the bucket that have a part of this name."""
    found = bucket(s3).get_file_info(fs.FileSelector(BUCKET, recursive=True))
    return sorted(entry.path for entry in found if pattern in entry.path)


def test_a_folder_that_is_not_shared_is_refused_at_once(ready: Project, own_folder: Path):
    ready.change({"scaling.storage": str(own_folder)})
    output = ready.stage("train", expect=1)
    assert f"error: {own_folder} is not shared by all 2 nodes of the cluster" in output
    assert "what the driver wrote there is missing" in output
    assert "scaling.storage of params.yaml" in output
    assert list(own_folder.rglob("checkpoint*")) == []
    ready.change({"model.latent_dim": None})
    assert f"error: {own_folder} is not shared by" in ready.stage("sweep", expect=1)
    ready.change({"model.latent_dim": PINNED["model.latent_dim"]})


def test_data_that_one_node_has_to_itself_are_not_read_on_the_others(
    ready: Project, own_folder: Path, s3: dict[str, str], tmp_path: Path
):
    """A stream is refused at once; pictures are decoded where they are seen."""
    project = ready.copy(own_folder / "project")
    project.environment |= ready.environment
    project.change({"training.memory_limit_mb": 1, "scaling.storage": f"s3://{BUCKET}/streams"})
    output = project.stage("train", expect=1)
    train = own_folder / "project" / "data" / "prepared" / "train"
    assert f"error: {train} is not the same folder on all 2 nodes of the cluster" in output
    assert "training.memory_limit_mb of params.yaml" in output
    pictures = own_folder / "pictures"
    pictures.mkdir()
    for level in range(20):
        Image.new("L", (4, 4), level).save(pictures / f"{level:02}.png")
    output = ready.run(
        sys.executable, "-c", DECODE, str(pictures), str(tmp_path), PYTHONPATH=str(REPOSITORY)
    )
    assert "not all nodes of the cluster see the pictures" in output
    assert output.splitlines()[-1] == f"{16 * sum(range(20))} 20"


def test_training_on_s3_outlives_its_worker_and_its_driver(
    ready: Project, cluster: Cluster, s3: dict[str, str]
):
    ready.change({"scaling.storage": f"s3://{BUCKET}/runs", "scaling.num_workers": 2})
    process = ready.start(*ready.stage_command("train"))
    until(lambda: len(epochs_logged(ready)) >= 5, process)
    worker, _ = cluster.processes("RayTrainWorker")
    worker.kill()
    before = len(epochs_logged(ready))
    until(lambda: len(epochs_logged(ready)) >= before + 5, process)
    kill(process)
    assert epochs_logged(ready)[-1] < EPOCHS
    finish(ready.start(*ready.stage_command("train")))
    history = pd.read_csv(ready.folder / "reports" / "train" / "history.csv")
    assert history["epoch"].tolist() == list(range(1, EPOCHS + 1))
    checkpoints = in_bucket(s3, "/state.json")
    # Two are kept; a kill may leave one more, that was written and not yet reported.
    assert 2 <= len(checkpoints) <= 4, checkpoints
    local = ready.folder / ".tightbound" / "ray"
    assert [path for path in local.rglob("*") if path.suffix == ".safetensors"] == []


def test_a_sweep_on_s3_outlives_its_driver(ready: Project, s3: dict[str, str], tmp_path: Path):
    project = ready.copy(tmp_path)
    project.environment |= ready.environment
    project.change({"model.latent_dim": None, "model.likelihood": None, "sweep.epochs": 20})
    project.change({"scaling.storage": f"s3://{BUCKET}/sweeps"})
    process = project.start(*project.stage_command("sweep"))
    read_until(process, r"^sweep +trial (1)/4")
    kill(process)
    output = project.stage("sweep")
    (finished,) = re.findall(r"goes on: (\d) of 4 trials are finished", output)
    assert 1 <= int(finished) < 4
    assert trials(project)["status"].tolist() == ["ok"] * 4
    assert in_bucket(s3, "/attempt_") == []
    assert len(in_bucket(s3, "/trials/")) == 4


def test_data_on_s3_is_a_dependency_like_any_other(s3: dict[str, str], tmp_path: Path):
    project = Project.create(tmp_path)
    project.environment |= s3
    root = f"{BUCKET}/data/table.csv"
    project.change({"data.source": "table", "data.space": "continuous"})
    project.change({"data.root": f"s3://{root}", "sweep.likelihood": ["gaussian"]})
    status = ("dvc", "status", "prepare")
    for seed in (0, 1):
        rows = np.random.default_rng(seed).normal(size=(200, 2))
        with bucket(s3).open_output_stream(root) as stream:
            stream.write(pd.DataFrame(rows, columns=["a", "b"]).to_csv(index=False).encode())
        assert "prepare" in project.run(*status)
        assert "Running stage 'prepare'" in project.run("dvc", "repro", "prepare")
        assert project.run(*status) == "Data and pipelines are up to date.\n"
