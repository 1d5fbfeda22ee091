"""kill -9 of what trains, at a random moment: the run completes, to the bit as if undisturbed."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pytest

from tests.end_to_end.conftest import Project
from vae.checkpoint import file_hash

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EPOCHS = 30
PINNED = {
    "model.latent_dim": 2,
    "model.likelihood": "discretized_logistic",
    "training.epochs": EPOCHS,
    "training.patience": None,
}


def until(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def epochs_logged(project: Project) -> list[int]:
    """Every epoch that a worker reported, in order, over all attempts."""
    (log,) = (project.folder / ".tightbound" / "ray").glob("train-*/epochs.jsonl")
    return [json.loads(line)["epoch"] for line in log.read_text().splitlines()]


def has_logged(project: Project, count: int) -> bool:
    logs = list((project.folder / ".tightbound" / "ray").glob("train-*/epochs.jsonl"))
    return bool(logs) and len(logs[0].read_text().splitlines()) >= count


def workers(process: subprocess.Popen[str], title: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if title in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def result(project: Project) -> tuple[str, pd.DataFrame]:
    history = pd.read_csv(project.folder / "reports" / "train" / "history.csv")
    return file_hash(project.folder / "models" / "vae" / "weights.safetensors"), history


@pytest.fixture(scope="module")
def ready(make_project: Callable[[], Project]) -> Callable[[], Project]:
    """Makes projects that are ready to train: prepared, and with both axes pinned."""

    def make() -> Project:
        project = make_project()
        project.change(PINNED)
        for name in ("prepare", "selfcheck", "sweep"):
            project.stage(name)
        return project

    return make


@pytest.fixture(scope="module")
def undisturbed(ready: Callable[[], Project]) -> tuple[str, pd.DataFrame]:
    project = ready()
    project.stage("train")
    return result(project)


def check(project: Project, undisturbed: tuple[str, pd.DataFrame]) -> None:
    weights, history = result(project)
    expected_weights, expected = undisturbed
    assert weights == expected_weights
    assert history["epoch"].tolist() == list(range(1, EPOCHS + 1))
    assert history["valid_bound"].tolist() == expected["valid_bound"].tolist()


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_driver_goes_on_with_the_same_command(ready, undisturbed, seed):
    project = ready()
    process = project.start(*project.stage_command("train"))
    until(lambda: has_logged(project, random.Random(seed).randint(2, 12)))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = epochs_logged(project)
    project.stage("train")
    check(project, undisturbed)
    redone = [epoch for epoch, count in Counter(epochs_logged(project)).items() if count > 1]
    assert before
    assert len(redone) <= 2, f"epochs {redone} were trained twice"


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_worker_is_replaced(ready, undisturbed, seed):
    project = ready()
    process = project.start(*project.stage_command("train"))
    until(lambda: has_logged(project, random.Random(seed).randint(2, 12)))
    victims = workers(process, "RayTrainWorker")
    assert len(victims) == 2
    victims[seed].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    check(project, undisturbed)


def test_a_second_driver_is_refused_while_the_first_one_works(ready):
    project = ready()
    process = project.start(*project.stage_command("train"))
    until(lambda: has_logged(project, 1))
    refused = project.stage("train", expect=1)
    assert f"process {process.pid} is still working on this train" in refused.stdout
    process.communicate(timeout=600)
    assert process.returncode == 0


def test_killed_trial_is_run_again_and_the_sweep_completes(project: Project):
    project.change({"sweep.epochs": 40})
    project.stage("prepare")
    project.stage("selfcheck")
    process = project.start(*project.stage_command("sweep"))
    until(lambda: len(workers(process, "ray::ImplicitFunc")) > 0)
    time.sleep(random.Random(0).uniform(0.5, 3))
    for victim in workers(process, "ray::ImplicitFunc")[:1]:
        victim.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    trials = pd.read_csv(project.folder / "reports" / "sweep" / "trials.csv")
    assert trials["status"].tolist() == ["ok"] * 4


def test_killed_sweep_keeps_its_finished_trials(project: Project):
    project.change({"sweep.epochs": 20})
    project.stage("prepare")
    project.stage("selfcheck")
    process = project.start(*project.stage_command("sweep"))
    assert process.stdout is not None
    first = ""
    while " 1/4 " not in first:
        first = process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (run,) = (path for path in (project.folder / ".tightbound" / "ray").iterdir() if path.is_dir())
    started = {path.name: path.stat().st_ino for path in run.glob("trial_*")}
    again = project.stage("sweep").stdout
    assert "goes on with the trials that are finished" in again
    assert again.count("bits/dim") <= 3
    trials = pd.read_csv(project.folder / "reports" / "sweep" / "trials.csv")
    assert trials["status"].tolist() == ["ok"] * 4
    assert {f"trial_{name}" for name in trials["trial_id"]} >= set(started)


def test_changed_training_starts_anew(ready):
    """A changed learning rate must never go on from the old weights."""
    project = ready()
    project.change({"training.epochs": 3})
    project.stage("train")
    weights, _ = result(project)
    project.change({"training.learning_rate": 0.002})
    output = project.stage("train").stdout
    assert "epoch   1/3" in output
    assert result(project)[0] != weights
    assert len(list(Path(project.folder / ".tightbound" / "ray").glob("train-*/epochs.jsonl"))) == 2
