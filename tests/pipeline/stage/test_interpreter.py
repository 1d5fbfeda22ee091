"""A stage that the wrong Python starts goes on in the project's own."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a Python that has nothing but the standard library."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    return folder / "bin"


def run(command: list[str], folder: Path, bare: Path, **changes: str):
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    environment |= {"PATH": f"{bare}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)} | changes
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project without an environment of its own beside it."""
    (tmp_path / "pipeline").symlink_to(ROOT / "pipeline")
    (tmp_path / "vae").symlink_to(ROOT / "vae")
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    return tmp_path


def test_as_dvc_starts_it_by_its_own_path(project: Path, bare: Path) -> None:
    """DVC, by the python that has all, starts a shell, and that the first python of PATH."""
    starts = "from subprocess import call; exit(call('python -m pipeline.params', shell=True))"
    done = run([sys.executable, "-c", starts], project, bare, PYTHONPATH=str(project))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_an_environment_beside_the_project_is_found(project: Path, bare: Path) -> None:
    (project / ".venv").symlink_to(Path(sys.executable).parents[1])
    command = [str(bare / "python"), "-m", "pipeline.params"]
    done = run(command, project, bare, PYTHONPATH=str(project))
    assert done.returncode == 0, done.stderr


def test_where_there_is_none_it_is_said_in_a_sentence(project: Path, bare: Path) -> None:
    command = [str(bare / "python"), "-m", "pipeline.params"]
    done = run(command, project, bare, TIGHTBOUND_INTERPRETER="tried")
    assert done.returncode == 1
    assert "has no psutil, pydantic, torch, pyarrow, which the stages need; activate" in done.stderr
    assert "Traceback" not in done.stderr
