"""Ctrl-C on a real terminal at random moments of the stages that take long, and of `dvc repro`."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.end_to_end.conftest import LONGEST_SECONDS, Project
from tests.end_to_end.terminal import Terminal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LONGEST_SECONDS)]

PROMPT_SECONDS, GONE_SECONDS = 10, 30
LINE = "interrupted; the same command goes on from here"
# A stage, what is running when the moment comes, and what the stage makes.
MOMENTS = [
    ("sweep", "gcs_server", "reports/sweep"),
    ("sweep", "raylet/raylet", "reports/sweep"),
    ("sweep", "ray::ImplicitFunc", "reports/sweep"),
    ("train", "TrainController", "models/vae"),
    ("train", "RayTrainWorker", "models/vae"),
    ("evaluate", "pipeline.evaluate", "reports/evaluate"),
]
SLOW = {
    "sweep.epochs": 60,
    "training.epochs": 120,
    "training.patience": None,
    "evaluate.num_importance_samples": 20000,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project.create(tmp_path_factory.mktemp("project"))
    project.change(SLOW)
    project.run("dvc", "repro", "--quiet", "prepare", "selfcheck")
    return project


def interrupt(terminal: Terminal, code: int) -> None:
    """Press Ctrl-C; the prompt must be back, and nothing of the command left, in time."""
    pressed = time.monotonic()
    terminal.press_ctrl_c()
    assert terminal.end() == (code, pytest.approx(0, abs=PROMPT_SECONDS))
    while left := terminal.processes():
        assert time.monotonic() - pressed < GONE_SECONDS, left
        time.sleep(0.2)
    assert terminal.shown.count(LINE) == 1
    assert "Traceback" not in terminal.shown


def half_written(folder: Path) -> list[Path]:
    return [path for name in ("reports", "models") for path in folder.glob(f"{name}/**/.tmp-*")]


def test_in_each_stage(project: Project):
    """At the end the stages go on, and finish, from what the interruptions left."""
    chance = random.Random(4)
    for stage, running, output in MOMENTS:
        for earlier in {"train": ["sweep"], "evaluate": ["sweep", "train"]}.get(stage, []):
            if not (project.folder / "reports" / earlier).exists():
                project.stage(earlier)
        terminal = Terminal(project.folder, project.environment, *project.stage_command(stage))
        terminal.wait_for_process(running)
        time.sleep(chance.uniform(0, 2))
        interrupt(terminal, 130)
        assert not (project.folder / output).exists()
        assert half_written(project.folder) == []
    project.stage("evaluate")


def test_in_dvc_repro(project: Project):
    project.change({"sweep.epochs": 61})
    terminal = Terminal(project.folder, project.environment, "dvc", "repro", "sweep")
    terminal.wait_for_process("ray::ImplicitFunc")
    time.sleep(random.Random(5).uniform(0, 2))
    interrupt(terminal, 255)  # DVC's own code for a stage that failed
    output = project.run("dvc", "repro", "sweep")
    assert "goes on: 0 of 4 trials are finished" in output
