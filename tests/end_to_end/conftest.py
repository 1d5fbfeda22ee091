"""A small project for each test: the real code, real DVC, Ray and MLflow, little data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipeline.servers import running_s3

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
# As long as a loaded machine may need; nothing here takes that long on an idle one.
LONGEST_SECONDS = 900
SMALL = {
    "data.limit": 600,
    "model.hidden": [16],
    "sweep.latent_dim": [2, 4],
    "sweep.likelihood": ["discretized_logistic", "continuous_bernoulli"],
    "sweep.epochs": 2,
    "sweep.num_importance_samples": 8,
    "training.epochs": 4,
    "evaluate.num_importance_samples": 50,
}
EPOCHS = 40
PINNED = {
    "model.latent_dim": 2,
    "model.likelihood": "discretized_logistic",
    "training.epochs": EPOCHS,
    "training.patience": None,
}
# Stores of Ray and MLflow name folders by their absolute path, so a copy starts without them.
STORES = (".tightbound", "mlflow.db", "mlartifacts")
SURROUNDINGS = ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "DVC_ROOT", "DVC_EXP_NAME", "VIRTUAL_ENV")
BUCKET = "team"


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, str]]:
    """An S3 server with `BUCKET`; the variables by which it is reached."""
    with running_s3(BUCKET) as variables:
        yield variables


class Project:
    """A folder with a copy of this repository's files and small parameters, to run stages in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        for name in SURROUNDINGS:
            self.environment.pop(name, None)

    @classmethod
    def create(cls, folder: Path) -> Project:
        """A fresh project, committed to a git repository of its own; no stage has run."""
        for name in ("vae", "pipeline", "infra", "data/own"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / name, folder / name, ignore=ignore)
        (folder / ".dvc").mkdir()
        for name in ("dvc.yaml", "params.yaml", "requirements.lock", ".gitignore", ".dvcignore"):
            shutil.copy(REPOSITORY / name, folder)
        for name in ("config", ".gitignore"):
            shutil.copy(REPOSITORY / ".dvc" / name, folder / ".dvc")
        project = cls(folder)
        project.change(SMALL)
        project.git("init", "-q", "-b", "main")
        project.commit("small project")
        return project

    def copy(self, folder: Path) -> Project:
        """The same project elsewhere, with what its stages made, but with no Ray or MLflow."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        for path in (folder / name for name in STORES):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return Project(folder)

    def change(self, values: dict[str, Any]) -> None:
        """Set keys of params.yaml, given as section.key."""
        path = self.folder / "params.yaml"
        content = yaml.safe_load(path.read_text())
        for key, value in values.items():
            section, name = key.split(".")
            content[section][name] = value
        path.write_text(yaml.safe_dump(content, sort_keys=False))

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        return self.run("git", *identity, *arguments)

    def commit(self, message: str) -> None:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", message)

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, expect: int = 0, **environment: str) -> str:
        """All that a command prints, once it has ended with the expected exit code."""
        return finish(self.start(*command, **environment), expect)

    def stage(self, name: str, expect: int = 0) -> str:
        return self.run(*self.stage_command(name), expect=expect)

    def stage_command(self, name: str) -> list[str]:
        """A stage's command as dvc.yaml has it, in this interpreter."""
        stages = yaml.safe_load((self.folder / "dvc.yaml").read_text())["stages"]
        return [sys.executable, *stages[name]["cmd"].split()[1:]]


def finish(process: subprocess.Popen[str], expect: int = 0) -> str:
    """What a process prints until its end; a test fails with all of it at another exit code."""
    try:
        output, _ = process.communicate(timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        pytest.fail(f"{process.args} was still at work after {LONGEST_SECONDS} s:\n{output}")
    assert process.returncode == expect, (
        f"{process.args} ended with {process.returncode} instead of {expect}:\n{output}"
    )
    return output


@pytest.fixture(scope="session")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose data is prepared and whose estimators are checked."""
    project = Project.create(tmp_path_factory.mktemp("checked"))
    project.stage("prepare")
    project.stage("selfcheck")
    return project


@pytest.fixture(scope="session")
def pinned(checked: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that is ready to train."""
    project = checked.copy(tmp_path_factory.mktemp("pinned"))
    project.change(PINNED)
    project.stage("sweep")
    return project
