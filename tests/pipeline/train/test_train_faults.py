"""The train stage as a real command, against faults of its parameters and of the machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tests.pipeline.test_bad_input_commands import LONGEST_SECONDS, refused, run
from tests.pipeline.test_disk import train
from vae.models import VAEConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LONGEST_SECONDS)]

# Before a command: a /dev/shm of its own, with next to no room.
TINY_SHM = ("unshare", "--mount", "sh", "-c",
            'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"', "sh")  # fmt: skip


def change(folder: Path, section: str, **values: Any) -> None:
    path = folder / "params.yaml"
    content = yaml.safe_load(path.read_text())
    content[section] |= values
    path.write_text(yaml.safe_dump(content))


def outputs(folder: Path) -> list[str]:
    return [name for name in ("models", "reports/train") if (folder / name).exists()]


def test_more_workers_than_there_are_cpus(tmp_path: Path):
    command = train(tmp_path)
    change(tmp_path, "scaling", num_workers=4096)
    said = refused(run(tmp_path, *command))
    assert "4096 CPUs are asked for and " in said
    assert "lower scaling.num_workers" in said
    assert outputs(tmp_path) == []


def test_a_loss_that_becomes_nan(tmp_path: Path):
    command = train(tmp_path)
    change(tmp_path, "training", learning_rate=1e30, gradient_clip=None)
    said = refused(run(tmp_path, *command))
    assert "training diverged in epoch 1, step 1: the validation bound is not finite" in said
    assert "the last good epoch is kept in" in said
    assert outputs(tmp_path) == []


def test_a_worker_out_of_memory(tmp_path: Path):
    """More than any machine's address space holds: the allocation fails at once, for real."""
    command = train(tmp_path)
    best = tmp_path / "reports" / "sweep" / "best.json"
    content = json.loads(best.read_text())
    model = VAEConfig.from_dict(content["model"])
    content["model"] = replace(model, hidden=(16, 3_000_000, 20_000_000)).to_dict()
    best.write_text(json.dumps(content))
    said = refused(run(tmp_path, *command))
    assert "a training worker failed more often than scaling.max_failures allows" in said
    assert "it ran out of memory; lower training.batch_size, scaling.num_workers or" in said
    assert outputs(tmp_path) == []


def test_a_node_out_of_memory(tmp_path: Path):
    """Ray ends workers where a machine's memory is used up: here, where a hundredth of it is."""
    command = train(tmp_path)
    change(tmp_path, "training", epochs=100_000)
    limits = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "50"}
    said = refused(run(tmp_path, *command, variables=limits))
    assert "it ran out of memory; lower training.batch_size, scaling.num_workers or" in said
    assert outputs(tmp_path) == []


def test_no_room_in_shared_memory(tmp_path: Path):
    """Ray's object store goes to the disk."""
    done = run(tmp_path, *train(tmp_path), before=TINY_SHM)
    if "Operation not permitted" in done.stderr:
        pytest.skip("this user may not mount a file system")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    history = pd.read_csv(tmp_path / "reports" / "train" / "history.csv")
    assert history["epoch"].tolist() == [1]
