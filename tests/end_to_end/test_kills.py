"""kill -9 of each stage, and of DVC while it runs one, at a random moment: the same command
completes, never beside a leftover, and what it makes is what an undisturbed run makes.

Twice each; `make soak` twenty times, or as often as `TIGHTBOUND_KILLS` says.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from tests.chance import KILLS, SEED, SOAK
from tests.end_to_end.conftest import LONGEST_SECONDS, Project, finish
from tests.end_to_end.test_faults import children, kill
from vae.system import file_hash

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LONGEST_SECONDS)]

STAGES = {
    "prepare": "data/prepared",
    "selfcheck": "reports/selfcheck.json",
    "sweep": "reports/sweep",
    "train": "models/vae",
    "evaluate": "reports/evaluate",
    "register": "reports/register.json",
    "report": "reports/report.html",
}
# test_faults.py kills the training more often, and looks closer.
KILLED = [stage for stage in STAGES if stage != "train" or SOAK]
TINY = {
    "data.limit": 300,
    "sweep.latent_dim": [2],
    "training.epochs": 3,
    "evaluate.num_importance_samples": 20,
}
# What tells when something was done, or how fast.
VOLATILE = ("started", "finished", "seconds", "time", "images_per_s")


@dataclass(frozen=True)
class Undisturbed:
    """A project that is done, what it holds, and how long each stage took."""

    project: Project
    results: dict[str, Any]
    seconds: dict[str, float]
    saved: Path

    def again(self) -> Project:
        """The same in the same place, but that Ray keeps no runs."""
        shutil.rmtree(self.project.folder)
        shutil.copytree(self.saved, self.project.folder)
        return self.project


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    project = Project.create(tmp_path_factory.mktemp("project"))
    project.change(TINY)
    seconds = {}
    for stage in STAGES:
        started = time.monotonic()
        project.run("dvc", "repro", "--single-item", stage)
        seconds[stage] = time.monotonic() - started
    shutil.rmtree(project.folder / ".tightbound" / "ray")
    saved = tmp_path_factory.mktemp("saved") / "project"
    shutil.copytree(project.folder, saved)
    return Undisturbed(project, results(project), seconds, saved)


def results(project: Project) -> dict[str, Any]:
    """All outputs by their path, but for what tells the time; pages and pictures by their hash."""
    found: dict[str, Any] = {}
    for output in STAGES.values():
        path = project.folder / output
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                found[str(file.relative_to(project.folder))] = content(file)
    return found


def content(file: Path) -> Any:
    if file.suffix == ".json":
        read = json.loads(file.read_text())
        return {k: v for k, v in read.items() if k not in VOLATILE}
    if file.suffix == ".csv":
        table = pd.read_csv(file)
        return table.drop(columns=[c for c in VOLATILE if c in table]).to_csv()
    return file_hash(file)


def forced(stage: str) -> tuple[str, ...]:
    """DVC's command that runs one stage, whatever its cache holds."""
    return ("dvc", "repro", "--force", "--single-item", stage)


def stage_process(repro: subprocess.Popen[str], stage: str) -> psutil.Process:
    """The stage that `dvc repro` runs, as soon as it does."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not (found := children(repro, f"-m pipeline.{stage} ")):
        assert repro.poll() is None, "it ended before"
        assert time.monotonic() < deadline, "the stage never ran"
        time.sleep(0.01)
    return found[0]


def start_and_wait(
    project: Project, stage: str, seconds: float
) -> tuple[subprocess.Popen[str], psutil.Process]:
    """`dvc repro` of one stage, `seconds` after that began: sooner where it has ended by then."""
    while True:
        repro = project.start(*forced(stage))
        process = stage_process(repro, stage)
        with suppress(psutil.TimeoutExpired):
            process.wait(seconds)
            finish(repro)
            seconds /= 2
            continue
        return repro, process


def moment(undisturbed: Undisturbed, stage: str, chance: random.Random) -> float:
    return chance.uniform(0, undisturbed.seconds[stage])


def check(project: Project, undisturbed: Undisturbed) -> None:
    """Nothing half-written lies about, and every output is as it was."""
    assert [str(path) for path in project.folder.rglob(".tmp-*")] == []
    assert results(project) == undisturbed.results


def kill_stage(project: Project, stage: str, seconds: float) -> None:
    """As `start_and_wait`, and kill -9: again where it ended by itself in that very moment."""
    while True:
        repro, process = start_and_wait(project, stage, seconds)
        with suppress(psutil.NoSuchProcess):
            kill(process)
        output, _ = repro.communicate(timeout=LONGEST_SECONDS)
        if repro.returncode == 255:
            return
        assert repro.returncode == 0, output
        seconds /= 2


def at_work(process: psutil.Process) -> bool:
    """Whether it still runs; one that has ended may wait for its parent's notice."""
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("time_of", range(KILLS))
@pytest.mark.parametrize("stage", KILLED)
def test_a_killed_stage(undisturbed: Undisturbed, stage: str, time_of: int):
    project, chance = undisturbed.again(), random.Random(f"{SEED} {stage} {time_of}")
    kill_stage(project, stage, moment(undisturbed, stage, chance))
    assert f"Running stage '{stage}'" in project.run(*forced(stage))
    check(project, undisturbed)


def test_a_second_run_is_refused_in_a_sentence(undisturbed: Undisturbed):
    """As `make run` asks before DVC, and DVC itself."""
    project = undisturbed.again()
    repro, process = start_and_wait(project, "selfcheck", 0)
    process.suspend()
    said = project.run(sys.executable, "-m", "pipeline.launch.preflight", expect=1)
    assert f"another run is at work in this project (process {repro.pid}: " in said
    assert "is busy, it is being blocked by" in project.run("dvc", "repro", expect=255)
    process.resume()
    finish(repro)
    check(project, undisturbed)


@pytest.mark.parametrize("time_of", range(KILLS))
def test_a_killed_dvc(undisturbed: Undisturbed, time_of: int):
    """Its stage ends with it, before another of the same begins."""
    chance = random.Random(f"{SEED} dvc {time_of}")
    project, stage = undisturbed.again(), chance.choice(list(STAGES))
    repro, process = start_and_wait(project, stage, moment(undisturbed, stage, chance))
    kill(repro)
    project.run(sys.executable, "-m", "pipeline.launch.preflight")
    again = project.start(*forced(stage))
    other = stage_process(again, stage)
    assert other.pid != process.pid
    assert not at_work(process), "two of one stage are at work"
    finish(again)
    check(project, undisturbed)
