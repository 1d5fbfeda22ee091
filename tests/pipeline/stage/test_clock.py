"""A clock that is set while a stage runs: moments may jump, durations don't."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LIBRARIES = [path for path in (Path("/usr/lib"), Path("/usr/local/lib")) if path.is_dir()]

# A training whose clock is set back by a day after its first epoch.
TRAINING = """
import json, sys, time, torch
from vae import VAE, VAEConfig
from vae.data import Dataset
from vae.training import TrainingConfig
from vae.training import TrainingState
from vae.training import fit

x = torch.randint(0, 256, (64, 1, 4, 4), dtype=torch.uint8)
model = VAE(VAEConfig(data_shape=(1, 4, 4), space="grey8", latent_dim=2, likelihood="gaussian"))
data = Dataset(train=x, valid=x, binarize=False)
rows = []
for stats in fit(model, data, TrainingConfig(epochs=3, batch_size=32), TrainingState()):
    rows.append(stats.to_row())
    open(sys.argv[1], "w").write("-1d")
print(json.dumps([[row["time"], row["seconds"]] for row in rows]))
"""


def test_no_duration_is_taken_from_the_clock_on_the_wall():
    """Nothing is subtracted from, or added to, `time.time()`; `time.monotonic()` is for that."""
    found = []
    for path in [*(ROOT / "vae").rglob("*.py"), *(ROOT / "pipeline").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            sums = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub)
            if not (isinstance(node, ast.expr) and (sums or isinstance(node, ast.Compare))):
                continue
            if "time.time()" in ast.unparse(node):
                found.append(f"{path.name}:{node.lineno}")
    assert found == []


def test_a_training_while_the_clock_is_set_back(tmp_path: Path):
    preloads = [path for folder in LIBRARIES for path in folder.rglob("libfaketime.so.1")]
    if not preloads:
        pytest.skip("faketime is not installed")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    environment = os.environ | {
        "LD_PRELOAD": str(preloads[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", TRAINING, str(clock)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (first, second, third) = json.loads(done.stdout)
    assert first[0] - second[0] == pytest.approx(86_400, abs=600)
    assert third[0] > second[0]
    assert all(0 < seconds < 600 for _, seconds in (first, second, third))
