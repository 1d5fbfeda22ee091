"""A full disk and a folder that may not be written: told, the former outputs intact, and the same
command goes on once there is room. On a real small file system, where this user may mount one.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.stage import fault_of_the_disk, load_meta
from tests.pipeline.builders import pipeline_outputs, prepared_data, sweep_outputs, write_json
from tests.pipeline.params.test_params import SHIPPED
from tests.pipeline.test_bad_input_commands import (
    LONGEST_SECONDS,
    ROOT,
    everything,
    params_for,
    refused,
    run,
)
from vae.models import VAEConfig

MEGABYTES = 20
ROOM = 2**16  # enough to begin a training, and less than its first checkpoint


def mounted(folder: Path, *options: str) -> bool:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", *options, "none", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of some megabytes."""
    folder = tmp_path / "disk"
    if not mounted(folder, "-o", f"size={MEGABYTES}m"):
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, room: int = 0) -> Path:
    """Take all that is left, but for so many bytes."""
    ballast = folder / "ballast"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    ballast.write_bytes(bytes(max(0, free - room)))
    return ballast


def prepare(folder: Path) -> tuple[str, ...]:
    """A set of pictures that is ready to be prepared, after another one was."""
    prepared_data(folder / "data" / "prepared")
    x = np.random.default_rng(0).integers(0, 256, (200, 20, 20), dtype=np.uint8)
    np.save(folder / "x.npy", x)
    data = {"source": "npy", "root": "x.npy", "space": "grey8"}
    (folder / "params.yaml").write_text(params_for(data))
    return ("pipeline.prepare", "--prepared", "data/prepared")


def evaluate(folder: Path) -> tuple[str, ...]:
    paths = pipeline_outputs(folder)
    (folder / "params.yaml").write_bytes(SHIPPED.read_bytes())
    flags = {"prepared": paths.prepared, "model": paths.model, "train": paths.train,
             "evaluate": paths.evaluate}  # fmt: skip
    words = [word for name, path in flags.items() for word in (f"--{name}", str(path))]
    return ("pipeline.evaluate", *words)


def selfcheck(folder: Path) -> tuple[str, ...]:
    (folder / "reports").mkdir()
    (folder / "reports" / "selfcheck.json").write_text("{}")
    (folder / "params.yaml").write_bytes(SHIPPED.read_bytes())
    return ("pipeline.selfcheck", "--selfcheck", "reports/selfcheck.json")


def project_of(folder: Path, **sections: dict[str, object]) -> None:
    """What a stage that trains needs around it: the code, dvc.yaml, params.yaml and data."""
    for name in ("vae", "pipeline", "dvc.yaml"):
        (folder / name).symlink_to(ROOT / name)
    content = yaml.safe_load(SHIPPED.read_text())
    content["scaling"] |= {"num_workers": 1, "max_failures": 0}
    for section, values in sections.items():
        content[section] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    prepared_data(folder / "data" / "prepared")
    write_json(folder / "reports" / "selfcheck.json", {"passed": True, "checks": []})


def sweep(folder: Path) -> tuple[str, ...]:
    project_of(
        folder,
        model={"hidden": [256, 256]},
        sweep={"latent_dim": [2], "likelihood": ["gaussian"], "epochs": 1},
    )
    flags = "--prepared data/prepared --selfcheck reports/selfcheck.json --sweep reports/sweep"
    return ("pipeline.sweep", *flags.split())


def train(folder: Path) -> tuple[str, ...]:
    project_of(folder, training={"epochs": 1})
    content = yaml.safe_load(SHIPPED.read_text())
    model = VAEConfig(data_shape=(1, 4, 4), space="grey8", latent_dim=2, likelihood="gaussian",
                      hidden=(256, 256))  # fmt: skip
    best = sweep_outputs(folder / "reports" / "sweep") / "best.json"
    chosen = {"model": model.to_dict(), "objective": content["objective"]}
    write_json(best, json.loads(best.read_text()) | chosen)
    flags = "--prepared data/prepared --sweep reports/sweep --model models/vae"
    return ("pipeline.train", *flags.split(), "--train", "reports/train")


def register(folder: Path) -> tuple[str, ...]:
    paths = pipeline_outputs(folder)
    (folder / "params.yaml").write_bytes(SHIPPED.read_bytes())
    write_json(folder / "register.json", {})
    words = [word for name, path in vars(paths).items() for word in (f"--{name}", str(path))]
    return ("pipeline.register", *words, "--register", "register.json")


STORES = (".tightbound", "mlflow.db", "mlartifacts", "ballast")


def outputs(folder: Path) -> dict[str, bytes]:
    """All but what runs on this machine keep for themselves."""
    found = everything(folder)
    return {name: found[name] for name in found if not name.startswith(STORES)}


@pytest.mark.slow
@pytest.mark.timeout(3 * LONGEST_SECONDS)
@pytest.mark.parametrize(
    ("stage", "room"),
    [(prepare, 0), (selfcheck, 0), (sweep, 0), (train, ROOM), (evaluate, 0), (register, ROOM)],
)
def test_a_full_disk(small_disk: Path, stage: Callable[[Path], tuple[str, ...]], room: int):
    """With some room Ray's checkpoint or MLflow's database is what meets the end of it."""
    command = stage(small_disk)
    ballast = fill(small_disk, room)
    before = outputs(small_disk)
    said = refused(run(small_disk, *command), after_warnings=True)
    assert "the disk is full" in said
    assert "make some space, and the same command goes on" in said
    assert outputs(small_disk) == before
    ballast.unlink()
    done = run(small_disk, *command)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_project_that_may_only_be_read(small_disk: Path):
    command = prepare(small_disk)
    before = load_meta(small_disk / "data" / "prepared")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    said = refused(run(small_disk, *command))
    assert "Read-only file system; the project's folder has to be writable" in said
    assert load_meta(small_disk / "data" / "prepared") == before


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(28, "No space left on device", "a/b"), "the disk is full (a/b"),
        (OSError("[Errno 28] Error writing bytes. Detail: No space left"), "the disk is full (."),
        (OSError(30, "Read-only file system", "a"), "a: Read-only file system; the project's"),
        (OSError(2, "No such file", "a"), None),
        (ValueError("No space left on device"), None),
    ],
)
def test_faults_of_the_disk_are_sentences(error: Exception, sentence: str | None):
    found = fault_of_the_disk(error)
    assert found is None if sentence is None else str(found).startswith(sentence)
