"""A model that version 0.1.0 registered is served and scored as it was then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.score import describe
from vae.evidence import example_generators, importance_sampling
from vae.models import load

HERE = Path(__file__).parent / "registered_0_1"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("registered")
    with tarfile.open(HERE / "model.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "packed"


@pytest.fixture(scope="module")
def expected() -> dict[str, list[float]]:
    return json.loads((HERE / "expected.json").read_text())


# With the product beside it, as `tightbound score` loads it, and alone, as a server does.
BESIDE = "import vae.evidence\nfrom pipeline.score.packed_model import load\nmodel = load(folder)\n"
ALONE = "import mlflow.pyfunc\nmodel = mlflow.pyfunc.load_model(str(folder))\n"


@pytest.mark.parametrize("way", [BESIDE, ALONE], ids=["beside", "alone"])
def test_it_scores_as_it_did(
    packed: Path, expected: dict[str, list[float]], tmp_path: Path, way: str
) -> None:
    script = (
        "import json, sys\nfrom pathlib import Path\nimport numpy as np\n"
        f"folder = Path({str(packed)!r})\n"
        f"asked = json.load(open({str(HERE / 'expected.json')!r}))\n"
        f"{way}"
        "x = np.array(asked['x'], dtype='uint8')\n"
        "table = model.predict(x, params={'seed': asked['seed']})\n"
        "print(json.dumps([sys.modules['vae'].__file__, list(table.log_px), list(table.se)]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if way is BESIDE:
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-B", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    where, log_px, se = json.loads(done.stdout.splitlines()[-1])
    assert Path(where).is_relative_to(packed)
    np.testing.assert_allclose(log_px, expected["log_px"], rtol=1e-6)
    np.testing.assert_allclose(se, expected["se"], rtol=1e-5)


def test_its_weights_score_the_same_by_the_code_of_today(
    packed: Path, expected: dict[str, list[float]]
) -> None:
    """As where a champion of then meets a model of now."""
    import torch

    described = describe(packed)
    x = torch.tensor(np.array(expected["x"], dtype="uint8"))
    evidence = importance_sampling(
        load(packed / "artifacts"), x, described.num_samples, generator=example_generators(x, 3)
    )
    np.testing.assert_allclose(evidence.log_px.numpy(), expected["log_px"], rtol=1e-6)
