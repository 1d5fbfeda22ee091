"""`import vae` is light and does nothing."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vae.evidence

ROOT = Path(__file__).parents[2]
HEAVY = ["dvc", "mlflow", "pandas", "pipeline", "ray"]
ALLOWED = {"torch", "numba", "numpy", "safetensors", "vae"}

IMPORT_ALL = """
import importlib, pkgutil, vae
for module in pkgutil.walk_packages(vae.__path__, "vae."):
    importlib.import_module(module.name)
"""


def in_a_new_process(code: str, folder: Path, *paths: Path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT]))}
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


def heavy_modules_after(code: str, folder: Path, *paths: Path) -> list[str]:
    report = f"\nimport json, sys\nprint(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))"
    return in_a_new_process(code + report, folder, *paths)


def test_import_loads_neither_ray_mlflow_dvc_nor_pandas(tmp_path):
    assert heavy_modules_after(IMPORT_ALL, tmp_path) == []


def test_the_public_names_are_where_they_are_documented(tmp_path):
    code = """
import json
from vae import VAE, FactorAnalysis, VAEConfig, load, save
from vae.evidence import annealed_importance_sampling, bidirectional
from vae.evidence import importance_sampling, prior_monte_carlo
from vae.objectives import Objective
from vae.training import TrainingConfig
from vae.training import fit
names = [VAE, FactorAnalysis, VAEConfig, load, save, annealed_importance_sampling, bidirectional,
         importance_sampling, prior_monte_carlo, Objective, TrainingConfig, fit]
print(json.dumps([callable(name) for name in names]))
"""
    assert in_a_new_process(code, tmp_path) == [True] * 12


def test_a_face_names_what_it_lacks():
    with pytest.raises(AttributeError, match="evidence has no public name 'nothing'"):
        vae.evidence.nothing  # type: ignore[attr-defined]  # noqa: B018
    assert "importance_sampling" in dir(vae.evidence)


def test_numba_is_loaded_where_it_compiles(tmp_path):
    code = "import json, sys, vae.evidence, vae.training\nprint(json.dumps('numba' in sys.modules))"
    assert in_a_new_process(code, tmp_path) is False


def test_the_package_alone_depends_on_what_vae_imports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in project["dependencies"]}
    assert names == ALLOWED - {"vae"}


def test_the_import_guard_finds_each_of_them(tmp_path):
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "careless.py").write_text("\n".join(f"import {name}" for name in HEAVY))
    assert heavy_modules_after("import careless", tmp_path, tmp_path) == HEAVY


def test_import_does_nothing(tmp_path):
    """No folder, no seed, no logger, no thread setting."""
    code = """
import json, logging, os, torch
facts = lambda: [torch.random.get_rng_state().tolist(), torch.get_num_threads(),
                 str(torch.get_default_dtype()), len(logging.root.handlers), os.listdir()]
torch.manual_seed(3)
before = facts()
"""
    code += IMPORT_ALL + "\nprint(json.dumps([before == facts(), os.listdir()]))"
    assert in_a_new_process(code, tmp_path) == [True, []]
