"""The wheel: what is installed from it makes the report without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.pipeline.report.test_report import (
    ARGUMENTS,
    outputs,  # noqa: F401 (a fixture)
)

ROOT = Path(__file__).parents[3]
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a wheel of this tree was unpacked to."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("vae", "pipeline"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=tree, check=True, capture_output=True
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_it_holds_all_code_and_data_files(installed: Path) -> None:
    def files(root: Path) -> set[str]:
        return {
            str(path.relative_to(root))
            for top in ("vae", "pipeline")
            for path in (root / top).rglob("*")
            if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
        }

    assert files(installed) == files(ROOT)
    assert {"vae/py.typed", "pipeline/py.typed", "pipeline/report/hover.js"} <= files(installed)


def test_an_installed_copy_makes_the_report(
    installed: Path,
    outputs: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """In a process that finds neither the checkout nor an editable installation of it."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    alone = (
        "import runpy, sys\n"
        "for finder in [f for f in sys.meta_path if '__editable__' in f'{f!r}']:\n"
        "    sys.meta_path.remove(finder)\n"
        "sys.argv[0] = 'report'\n"
        "import pipeline\n"
        f"assert pipeline.__file__.startswith({str(installed)!r}), pipeline.__file__\n"
        "runpy.run_module('pipeline.report', run_name='__main__')\n"
    )
    page = tmp_path / "page.html"
    paths = {name: outputs[name] for name in ARGUMENTS} | {"report": page}
    flags = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path / 'mlflow.db'}"
    done = subprocess.run(
        [sys.executable, "-c", alone, *flags],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (ROOT / "pipeline" / "report" / "hover.js").read_text().strip() in page.read_text()
