"""Two nodes, each a `ray start` of its own: world sizes, streams, and a node killed mid-epoch."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from tests.chance import KILLS
from tests.end_to_end.conftest import LONGEST_SECONDS, Project, finish
from tests.end_to_end.nodes import Cluster
from tests.end_to_end.test_faults import (
    Outcome,
    Record,
    epochs_in_mlflow,
    epochs_logged,
    little_redone,
    until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LONGEST_SECONDS)]

EPOCHS, LONG = 3, 200
PINNED = {
    "model.latent_dim": 2,
    "model.likelihood": "discretized_logistic",
    "training.epochs": EPOCHS,
    "training.patience": None,
    "data.limit": 2000,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and a node, two CPUs each."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), num_cpus=2)
    try:
        cluster.add(num_cpus=2)
        cluster.until_nodes(2)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that is ready to train."""
    project = Project.create(tmp_path_factory.mktemp("ready"))
    project.change(PINNED)
    for stage in ("prepare", "selfcheck", "sweep"):
        project.stage(stage)
    return project


def history(project: Project, cluster: Cluster, **scaling: int) -> pd.DataFrame:
    """What a training on the cluster leaves; runs of another scaling start anew."""
    project.change({f"scaling.{key}": value for key, value in scaling.items()})
    storage = {"TIGHTBOUND_STORAGE": str(project.folder / f"runs-{scaling['num_workers']}")}
    finish(project.start(*project.stage_command("train"), **cluster.variables, **storage))
    return pd.read_csv(project.folder / "reports" / "train" / "history.csv")


def test_one_two_and_four_workers_train_as_one(ready: Project, cluster: Cluster):
    """Four of them span both nodes; the global batch is the same."""
    alone = history(ready, cluster, num_workers=1)
    columns = ["train_elbo", "train_kl", "valid_elbo", "valid_kl", "valid_bound"]
    assert alone["epoch"].tolist() == list(range(1, EPOCHS + 1))
    for count in (2, 4):
        together = history(ready, cluster, num_workers=count)
        for column in columns:
            assert together[column].tolist() == pytest.approx(alone[column].tolist(), rel=1e-4)


def test_a_request_beyond_the_cluster_is_refused_at_once(ready: Project, cluster: Cluster):
    ready.change({"scaling.num_workers": 5, "scaling.threads_per_worker": 1})
    output = ready.run(*ready.stage_command("train"), expect=1, **cluster.variables)
    assert "5 CPUs are asked for and 4 are there; lower scaling.num_workers" in output
    ready.change({"scaling.num_workers": 1, "scaling.threads_per_worker": 3})
    output = ready.run(*ready.stage_command("train"), expect=1, **cluster.variables)
    assert "have room for 0, since no worker spans two nodes" in output
    ready.change({"scaling.threads_per_worker": 1})


def test_a_stream_trains_as_data_in_memory_does(ready: Project, cluster: Cluster, tmp_path: Path):
    """Other orders and noise, the same distribution: the spread over seeds is about 10 nats."""
    project = ready.copy(tmp_path)
    in_memory = history(project, cluster, num_workers=2)
    project.change({"training.memory_limit_mb": 1})
    streamed = history(project, cluster, num_workers=2)
    assert streamed["epoch"].tolist() == list(range(1, EPOCHS + 1))
    last, expected = streamed.iloc[-1], in_memory.iloc[-1]
    assert last["valid_elbo"] != expected["valid_elbo"]
    assert last["valid_elbo"] == pytest.approx(expected["valid_elbo"], rel=0.03)


@pytest.fixture(scope="module")
def spanning(ready: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose three workers take more than a node."""
    project = ready.copy(tmp_path_factory.mktemp("spanning"))
    project.change({"training.epochs": LONG, "scaling.num_workers": 3})
    return project


@pytest.fixture(scope="module")
def undisturbed(
    spanning: Project, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    project = spanning.copy(tmp_path_factory.mktemp("undisturbed"))
    finish(project.start(*project.stage_command("train"), **cluster.variables))
    return Outcome.of(project)


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_lost_node_is_replaced_to_the_bit(
    spanning: Project,
    undisturbed: Outcome,
    cluster: Cluster,
    tmp_path: Path,
    seed: int,
    record_property: Record,
):
    """kill -9 of the raylet that a worker runs on; a further node takes its place."""
    project = spanning.copy(tmp_path)
    process = project.start(*project.stage_command("train"), **cluster.variables)
    moment = random.Random(seed).randint(5, LONG // 3)
    until(lambda: len(epochs_logged(project)) >= moment, process)
    lost = next(node for node in cluster.nodes[1:] if node.below("ray::RayTrainWorker"))
    killed = time.time()
    cluster.lose(lost)
    cluster.add(num_cpus=2)
    finish(process)
    found = Outcome.of(project)
    assert found.weights == undisturbed.weights
    pd.testing.assert_frame_equal(found.history, undisturbed.history, check_exact=True)
    assert epochs_in_mlflow(project) == list(range(1, LONG + 1))
    record_property("seconds_redone", little_redone(project, killed))
    cluster.until_nodes(2)


def test_training_outlives_a_node_and_takes_it_back(
    ready: Project, cluster: Cluster, tmp_path: Path
):
    """Four workers, two when a node is gone, four again when another is there."""
    project = ready.copy(tmp_path)
    project.change({"training.epochs": 4 * LONG})
    project.change({"scaling.num_workers": 4, "scaling.min_workers": 2})
    process = project.start(*project.stage_command("train"), **cluster.variables)
    until(lambda: len(epochs_logged(project)) >= 20 and cluster.workers() == 4, process)
    killed = time.time()
    cluster.lose(cluster.nodes[-1])
    before = len(epochs_logged(project))
    until(lambda: len(epochs_logged(project)) >= before + 20, process)
    assert cluster.workers() == 2
    cluster.add(num_cpus=2)
    until(lambda: cluster.workers() == 4, process)
    before = len(epochs_logged(project))
    until(lambda: len(epochs_logged(project)) >= before + 20, process)
    finish(process)
    table = pd.read_csv(project.folder / "reports" / "train" / "history.csv")
    assert table["epoch"].tolist() == list(range(1, 4 * LONG + 1))
    assert epochs_in_mlflow(project) == list(range(1, 4 * LONG + 1))
    little_redone(project, killed)
