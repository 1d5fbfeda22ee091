"""A small project for each test: the real code, real DVC, Ray and MLflow, little data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SMALL = {
    "data.limit": 600,
    "model.hidden": [16],
    "sweep.latent_dim": [2, 3],
    "sweep.likelihood": ["discretized_logistic", "continuous_bernoulli"],
    "sweep.epochs": 2,
    "sweep.num_importance_samples": 8,
    "training.epochs": 4,
    "evaluate.num_importance_samples": 20,
}


class Project:
    """A copy of the repository in a folder of its own, with small parameters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("vae", "pipeline"):
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / name, folder / name, ignore=ignore)
        for name in ("dvc.yaml", "params.yaml", ".gitignore", ".dvcignore"):
            shutil.copy(REPOSITORY / name, folder / name)
        (folder / "data" / "own").mkdir(parents=True)
        for path in (REPOSITORY / "data" / "own").glob("*"):
            shutil.copy(path, folder / "data" / "own")
        (folder / ".dvc").mkdir()
        shutil.copy(REPOSITORY / ".dvc" / "config", folder / ".dvc" / "config")
        self.environment = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "DVC_NO_ANALYTICS": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "DVC_ROOT"):
            self.environment.pop(name, None)
        self.change(SMALL)
        self.git("init", "-q", "-b", "main")
        self.commit("small project")

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
        return self.run("git", *identity, *arguments).stdout

    def commit(self, message: str) -> None:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", message)

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )

    def run(self, *command: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        """Run to the end; a test fails with all output unless the exit code is the expected one."""
        process = self.start(*command)
        output, _ = process.communicate(timeout=600)
        assert process.returncode == expect, f"{command} exited {process.returncode}:\n{output}"
        return subprocess.CompletedProcess(command, process.returncode, output, "")

    def stage(self, name: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run(*self.stage_command(name), **options)

    def stage_command(self, name: str) -> list[str]:
        stages = yaml.safe_load((self.folder / "dvc.yaml").read_text())["stages"]
        return [sys.executable, *stages[name]["cmd"].split()[1:]]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture(scope="module")
def make_project(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Project]:
    return lambda: Project(tmp_path_factory.mktemp("project"))
