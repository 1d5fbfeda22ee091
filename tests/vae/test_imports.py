"""`import vae` is light and does nothing; files import only what stands above them."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ["dvc", "mlflow", "pandas", "pipeline", "ray"]
ALLOWED = {"torch", "numba", "numpy", "safetensors", "vae"}

ORDER = [
    "files",
    "memory",
    "threads",
    "limits",
    "numerics",
    "distributions",
    "likelihoods",
    "networks",
    "priors",
    "posteriors",
    "model",
    "perceptron",
    "kernels",
    "decoding",
    "resampling",
    "objectives",
    "factor_analysis",
    "pareto",
    "noise",
    "importance_weights",
    "annealing",
    "optimizer",
    "proposals",
    "evidence",
    "diagnostics",
    "data",
    "shared_memory",
    "ranks",
    "cuda_graphs",
    "training",
    "checkpoint",
]
"""A file may import only files before it; the package's `__init__` comes last."""

IMPORT_ALL = """
import importlib, pkgutil, vae
for module in pkgutil.iter_modules(vae.__path__):
    importlib.import_module("vae." + module.name)
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


def imported(source: str) -> set[str]:
    """Modules that a source imports: "torch", "vae.model", …"""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "vae":
                found |= {f"vae.{alias.name}" for alias in node.names}
            else:
                found.add(str(node.module))
    return found


def faults(name: str, source: str) -> list[str]:
    """Imports of vae/<name>.py that are neither allowed packages nor files above it."""
    above = {f"vae.{other}" for other in ORDER[: ORDER.index(name)]}
    wrong = []
    for module in sorted(imported(source)):
        top = module.partition(".")[0]
        known = module in above if top == "vae" else top in ALLOWED | set(sys.stdlib_module_names)
        if not known:
            wrong.append(module)
    return wrong


def test_every_file_has_a_place_in_the_order():
    assert sorted(ORDER) == sorted(p.stem for p in (ROOT / "vae").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_files_above_it(name):
    assert faults(name, (ROOT / "vae" / f"{name}.py").read_text()) == []


def test_a_wrong_import_is_found():
    source = (
        "import math\nimport pandas\nfrom vae import model, numerics\nfrom vae.data import Batch"
    )
    assert faults("likelihoods", source) == ["pandas", "vae.data", "vae.model"]
    assert faults("networks", "from pipeline.stage import run") == ["pipeline.stage"]
