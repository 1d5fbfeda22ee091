"""A full disk and a folder that may not be written: told, the former outputs intact, and the same
command goes on once there is room. On a real small file system, where this user may mount one.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.prepared import load_meta
from pipeline.stage import fault_of_the_disk
from tests.pipeline.builders import pipeline_outputs, prepared_data
from tests.pipeline.test_bad_input_commands import everything, params_for, refused, run
from tests.pipeline.test_params import SHIPPED

MEGABYTES = 3


def mounted(folder: Path, *options: str) -> bool:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", *options, "none", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes."""
    folder = tmp_path / "disk"
    if not mounted(folder, "-o", f"size={MEGABYTES}m"):
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all that is left."""
    ballast = folder / "ballast"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    ballast.write_bytes(bytes(free))
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


@pytest.mark.slow
@pytest.mark.parametrize("stage", [prepare, selfcheck, evaluate])
def test_a_full_disk(small_disk: Path, stage: Callable[[Path], tuple[str, ...]]):
    command = stage(small_disk)
    ballast = fill(small_disk)
    before = everything(small_disk)
    said = refused(run(small_disk, *command))
    assert "the disk is full" in said
    assert "make some space, and the same command goes on" in said
    assert everything(small_disk) == before
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
