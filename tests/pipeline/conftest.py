"""What tests of tracking and registration share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.tracking import URI_VARIABLE
from tests.pipeline.servers import at_home, free_port, mlflow_command, running


@pytest.fixture(autouse=True)
def no_store_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow writes the address that it is given into the environment."""
    monkeypatch.delenv(URI_VARIABLE, raising=False)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's empty database; copying it is much faster than its migrations."""
    from pipeline.tracking import Store

    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        Store(f"sqlite:///{path}", "Default")
    return path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Iterator[str]:
    """The address of a real MLflow server with a database of its own."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_database, folder / "m.db")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with running(mlflow_command(folder, port), folder, port):
        yield address


@pytest.fixture
def project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_database: Path
) -> Iterator[Path]:
    """An empty project folder with a database of its own."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    with at_home(tmp_path, monkeypatch):
        yield tmp_path
