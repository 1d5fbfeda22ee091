"""kill -9 of what trains, at a random moment: the run completes, to the bit as if undisturbed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest

from tests.chance import KILLS
from tests.end_to_end.conftest import EPOCHS, LONGEST_SECONDS, Project, finish
from vae.system import file_hash

MOST_REDONE_SECONDS = 5.0
Record = Callable[[str, object], None]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LONGEST_SECONDS)]


def until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something that happens while a process runs."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not condition():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def kill(process: psutil.Process | subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(LONGEST_SECONDS)


def logs(project: Project) -> list[Path]:
    """The log of epochs of each training run."""
    return list((project.folder / ".tightbound" / "ray").glob("train-*/epochs.jsonl"))


def epochs_logged(project: Project) -> list[int]:
    """Every epoch that the workers reported, in order, over all attempts."""
    text = "".join(log.read_text() for log in logs(project))
    lines = text.splitlines(keepends=True)
    return [json.loads(line)["epoch"] for line in lines if line.endswith("\n")]


def children(
    process: subprocess.Popen[str] | subprocess.Popen[bytes], title: str
) -> list[psutil.Process]:
    """Processes below this one that have a title."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if title in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def little_redone(project: Project, killed: float) -> float:
    """Seconds of training before the kill that were trained again: those since the last epoch kept.

    Fails where that is more than a few.
    """
    table = pd.read_csv(project.folder / "reports" / "train" / "history.csv")
    redone = float(killed - table.loc[table["time"] < killed, "time"].max())
    assert redone < MOST_REDONE_SECONDS
    return redone


def trials(project: Project) -> pd.DataFrame:
    return pd.read_csv(project.folder / "reports" / "sweep" / "trials.csv")


@dataclass(frozen=True)
class Outcome:
    """What a training left: the weights' hash and the history, but for times and speed."""

    weights: str
    history: pd.DataFrame

    @classmethod
    def of(cls, project: Project) -> Outcome:
        history = pd.read_csv(project.folder / "reports" / "train" / "history.csv")
        weights = file_hash(project.folder / "models" / "vae" / "weights.safetensors")
        return cls(weights, history.drop(columns=["time", "seconds", "images_per_s"]))


@dataclass(frozen=True)
class Undisturbed:
    project: Project
    outcome: Outcome
    refusal: str

    def check(self, project: Project) -> None:
        """Same weights to the bit, same history to the last digit; each epoch once in MLflow."""
        found = Outcome.of(project)
        assert found.weights == self.outcome.weights
        pd.testing.assert_frame_equal(found.history, self.outcome.history, check_exact=True)
        assert epochs_in_mlflow(project) == list(range(1, EPOCHS + 1))


def epochs_in_mlflow(project: Project) -> list[int]:
    """The steps at which the model's run holds a validation bound."""
    from mlflow import MlflowClient

    database = f"sqlite:///{project.folder / 'mlflow.db'}"
    client = MlflowClient(database, database)
    experiment = client.get_experiment_by_name("tightbound")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.`tightbound.kind` = 'model'")
    return [point.step for point in client.get_metric_history(run.info.run_id, "valid/elbo")]


@pytest.fixture(scope="module")
def undisturbed(pinned: Project, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """A training that nobody kills; a second one of the same is tried meanwhile."""
    project = pinned.copy(tmp_path_factory.mktemp("undisturbed"))
    process = project.start(*project.stage_command("train"))
    until(lambda: bool(epochs_logged(project)), process)
    process.send_signal(signal.SIGSTOP)
    refusal = project.stage("train", expect=1)
    process.send_signal(signal.SIGCONT)
    finish(process)
    assert f"process {process.pid} " in refusal
    return Undisturbed(project, Outcome.of(project), refusal)


@pytest.fixture
def project(pinned: Project, tmp_path: Path) -> Project:
    return pinned.copy(tmp_path)


@pytest.fixture
def unswept(checked: Project, tmp_path: Path) -> Project:
    return checked.copy(tmp_path)


def test_an_undisturbed_run_has_every_epoch_once(undisturbed: Undisturbed):
    assert undisturbed.outcome.history["epoch"].tolist() == list(range(1, EPOCHS + 1))
    assert epochs_logged(undisturbed.project) == list(range(1, EPOCHS + 1))
    undisturbed.check(undisturbed.project)


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_driver_goes_on_with_the_same_command(
    project: Project, undisturbed: Undisturbed, seed: int, record_property: Record
):
    process = project.start(*project.stage_command("train"))
    moment = random.Random(seed).randint(2, EPOCHS // 2)
    until(lambda: len(epochs_logged(project)) >= moment, process)
    killed = time.time()
    kill(process)
    before = epochs_logged(project)
    assert before[-1] < EPOCHS
    assert not (project.folder / "models").exists()
    project.stage("train")
    undisturbed.check(project)
    redone = [epoch for epoch, count in Counter(epochs_logged(project)).items() if count > 1]
    assert len(redone) <= 2, f"epochs {redone} were trained twice"
    record_property("seconds_redone", little_redone(project, killed))


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_worker_is_replaced(
    project: Project, undisturbed: Undisturbed, seed: int, record_property: Record
):
    process = project.start(*project.stage_command("train"))
    moment = random.Random(seed).randint(2, EPOCHS // 2)
    until(lambda: len(epochs_logged(project)) >= moment, process)
    workers = children(process, "RayTrainWorker")
    assert len(workers) == 2
    killed = time.time()
    workers[seed % 2].send_signal(signal.SIGKILL)
    assert epochs_logged(project)[-1] < EPOCHS
    finish(process)
    undisturbed.check(project)
    record_property("seconds_redone", little_redone(project, killed))


def test_changed_training_starts_anew(undisturbed: Undisturbed):
    """A changed learning rate must never go on from the old weights."""
    project = undisturbed.project
    project.change({"training.learning_rate": 0.001})
    start = time.time()
    project.stage("train")
    history = pd.read_csv(project.folder / "reports" / "train" / "history.csv")
    assert history["epoch"].tolist() == list(range(1, EPOCHS + 1))
    assert min(history["time"]) > start
    assert Outcome.of(project).weights != undisturbed.outcome.weights
    assert len(logs(project)) == 2


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_trial_is_run_again_and_the_sweep_completes(unswept: Project, seed: int):
    unswept.change({"sweep.epochs": 40})
    process = unswept.start(*unswept.stage_command("sweep"))
    until(lambda: bool(children(process, "ray::ImplicitFunc")), process)
    time.sleep(random.Random(seed).uniform(0.5, 3))
    kill(children(process, "ray::ImplicitFunc")[0])
    finish(process)
    assert trials(unswept)["status"].tolist() == ["ok"] * 4


@pytest.mark.parametrize("seed", range(KILLS))
def test_processes_killed_as_one_is_about_to_begin_another_trial(unswept: Project, seed: int):
    """Tune by itself gives up the trial that was to begin."""
    process = unswept.start(*unswept.stage_command("sweep"))
    until(lambda: len(children(process, "ray::ImplicitFunc")) == 2, process)
    actors = children(process, "ray::ImplicitFunc")
    assert process.stdout is not None
    while " 1/4 " not in process.stdout.readline():
        assert process.poll() is None, "it ended before"
    for actor in actors:
        actor.send_signal(signal.SIGSTOP)
    time.sleep(random.Random(seed).uniform(0.1, 0.5))
    for actor in actors:
        kill(actor)
    finish(process)
    assert trials(unswept)["status"].tolist() == ["ok"] * 4


def test_killed_sweep_keeps_its_finished_trials(unswept: Project):
    """One at a time; what was shown as finished is never run again, even with other scaling."""
    unswept.change({"sweep.epochs": 20, "sweep.max_concurrent": 1})
    process = unswept.start(*unswept.stage_command("sweep"))
    assert process.stdout is not None
    line = ""
    while " 2/4 " not in line:
        line = process.stdout.readline()
        assert line, "it ended before"
    kill(process)
    unswept.change({"scaling.threads_per_worker": 2, "sweep.max_concurrent": None})
    again = unswept.stage("sweep")
    assert "goes on: 2 of 4 trials are finished" in again
    assert [place for place in ("1/4", "2/4", "3/4", "4/4") if f" {place} " in again] == [
        "3/4",
        "4/4",
    ]
    assert trials(unswept)["status"].tolist() == ["ok"] * 4
