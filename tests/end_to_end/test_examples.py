"""The worked examples of docs/data.md, as they stand there, each through `dvc repro`."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
import yaml

from tests.end_to_end.conftest import LONGEST_SECONDS, REPOSITORY, Project

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * LONGEST_SECONDS)]

BLOCKS = re.findall(
    r"```(python|yaml) example=(\w+)\n(.*?)```",
    (REPOSITORY / "docs" / "data.md").read_text(),
    flags=re.DOTALL,
)
SHORT = {
    "sweep.latent_dim": [2],
    "sweep.epochs": 1,
    "training.epochs": 2,
    "evaluate.num_importance_samples": 50,
    "data.test_fraction": 0.2,
    "data.valid_fraction": 0.2,
}


def block(kind: str, example: str) -> str:
    (text,) = (text for k, name, text in BLOCKS if (k, name) == (kind, example))
    return text


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """One project for all examples: the estimators are checked once."""
    project = Project.create(tmp_path_factory.mktemp("examples"))
    project.change(SHORT)
    return project


@pytest.mark.parametrize(
    ("example", "shape", "facts", "changes"),
    [
        ("digits", [1, 8, 8], {"num_classes": 10, "dataset": "digits"}, {"data.limit": 400}),
        ("wine", [13], {"num_classes": 3, "dataset": "wine"}, {"data.limit": None}),
        ("patches", [3, 32, 32], {"num_classes": None, "dataset": "patches"},
         {"data.limit": 200, "model.hidden": [8, 8], "sweep.likelihood": ["discretized_logistic"]}),
    ],
)  # fmt: skip
def test_an_example_ends_with_a_champion(
    project: Project,
    example: str,
    shape: list[int],
    facts: dict[str, Any],
    changes: dict[str, Any],
):
    project.run(sys.executable, "-c", block("python", example))
    given = yaml.safe_load(block("yaml", example))
    flat = {f"{section}.{key}": v for section, keys in given.items() for key, v in keys.items()}
    untouched = {"data.label": None, "data.group": None, "model.network": "mlp"}
    project.change(untouched | {"model.hidden": [16]} | flat | changes)
    output = project.run("dvc", "repro")
    assert "Traceback" not in output
    assert "Warning" not in output
    meta = json.loads((project.folder / "data" / "prepared" / "meta.json").read_text())
    assert meta["data_shape"] == shape
    assert {key: meta[key] for key in facts} == facts
    assert meta["duplicates"]["across_splits"] == 0
    result = json.loads((project.folder / "reports" / "register.json").read_text())
    assert result["model_name"] == f"tightbound-{facts['dataset']}-{meta['space']}"
    assert result["verdict"] == "champion"

    root = project.folder / given["data"]["root"]
    changed = root / "more.png" if root.is_dir() else root
    before = changed.read_bytes() if changed.exists() else None
    changed.write_bytes((before or b"") + b"more")
    assert "prepare" in json.loads(project.run("dvc", "status", "--json"))
    changed.unlink() if before is None else changed.write_bytes(before)
    assert json.loads(project.run("dvc", "status", "--json")) == {}
