"""Wrong params files and bad data given to the real commands: one message, exit code 1, and
the earlier outputs are untouched. A third of the cases, chosen by seed; all in `make soak`.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.stage import load_meta
from tests.chance import SOAK, a_third
from tests.pipeline.bad_data import BAD_DATA, BadData, Bomb, folder_with, grey, picture
from tests.pipeline.builders import pipeline_outputs, prepared_data
from tests.pipeline.params.test_params import SHIPPED, WRONG_FILES, WRONG_VALUES, changed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = SHIPPED.parent
LONGEST_SECONDS = 600  # nothing here takes that long on an idle machine
WRONG_TEXTS = [(content, message) for content, message in WRONG_FILES] + [
    (changed(**{section: {key: value}}).encode(), message)
    for section, key, value, message in WRONG_VALUES
]


def run(
    folder: Path,
    *command: str,
    before: Sequence[str] = (),
    variables: Mapping[str, str] = MappingProxyType({}),
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    environment |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    return subprocess.run(
        [*before, sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST_SECONDS,
        **options,
    )


def refused(done: subprocess.CompletedProcess[str], *, after_warnings: bool = False) -> str:
    """What a refused command says: one message, on the error stream."""
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert after_warnings or len(said) == len(done.stderr.splitlines()), done.stderr
    assert said[0].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\nerror: ") <= after_warnings
    assert "TIGHTBOUND_DEBUG" not in done.stderr, "not a message for a person"
    return done.stderr


def everything(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def params_for(data: dict[str, Any]) -> str:
    content = yaml.safe_load(SHIPPED.read_text())
    content["data"] |= {"valid_fraction": 0.1, "test_fraction": 0.2} | data
    if data["space"] == "continuous":
        content["sweep"]["likelihood"] = ["gaussian"]
    return yaml.safe_dump(content)


def test_there_are_enough():
    assert len(WRONG_TEXTS) >= 60


@pytest.mark.parametrize(("content", "message"), a_third(WRONG_TEXTS))
def test_a_wrong_params_file(content: bytes, message: str, tmp_path: Path):
    """`prepare`, as every stage, refuses it before it does anything."""
    (tmp_path / "params.yaml").write_bytes(content)
    prepared_data(tmp_path / "data" / "prepared")
    before = everything(tmp_path)
    said = refused(run(tmp_path, "pipeline.prepare", "--prepared", "data/prepared"))
    assert message in said
    assert everything(tmp_path) == before


@pytest.mark.parametrize("bad", a_third(BAD_DATA), ids=lambda bad: bad.name)
def test_a_bad_data_set(bad: BadData, tmp_path: Path):
    prepared_data(tmp_path / "data" / "prepared")
    before = everything(tmp_path / "data")
    (tmp_path / "own").mkdir()
    (tmp_path / "params.yaml").write_text(params_for(bad.write(tmp_path / "own")))
    said = refused(run(tmp_path, "pipeline.prepare", "--prepared", "data/prepared"))
    assert re.search(bad.message, said)
    assert everything(tmp_path / "data") == before
    assert not Path("/tmp/tightbound-was-here").exists()


def without_roots_rights() -> None:
    """Before the command starts: root reads no file that its mode forbids."""
    drop_capability, dac_override, dac_read_search = 24, 1, 2
    for capability in (dac_override, dac_read_search):
        ctypes.CDLL(None).prctl(drop_capability, capability, 0, 0, 0)


def test_a_file_that_may_not_be_read(tmp_path: Path):
    def locked(path: Path) -> None:
        picture(grey(1)[0])(path)
        path.chmod(0)

    folder_with("a.png", locked)(tmp_path / "set")
    data = {"source": "folder", "root": str(tmp_path / "set"), "space": "grey8"}
    (tmp_path / "params.yaml").write_text(params_for(data))
    command = ("pipeline.prepare", "--prepared", "data/prepared")
    said = refused(run(tmp_path, *command, preexec_fn=without_roots_rights))
    assert "1 of 21 pictures cannot be used: a.png: Permission denied" in said


@pytest.mark.parametrize("fault", ["one bit", "cut", "a pickle in its place", "another's weights"])
def test_a_model_that_was_tampered_with_is_refused_by_its_hash(fault: str, tmp_path: Path):
    paths = pipeline_outputs(tmp_path)
    (tmp_path / "params.yaml").write_bytes(SHIPPED.read_bytes())
    weights = paths.model / "weights.safetensors"
    raw = bytearray(weights.read_bytes())
    if fault == "one bit":
        raw[-1] ^= 1
    elif fault == "a pickle in its place":
        raw = bytearray(pickle.dumps(Bomb()))
    elif fault == "another's weights":
        raw[-4:] = b"\0\0\0\0"
    weights.write_bytes(raw[: len(raw) // 2] if fault == "cut" else raw)
    before = everything(paths.evaluate)
    flags = {"prepared": paths.prepared, "model": paths.model, "train": paths.train,
             "evaluate": paths.evaluate}  # fmt: skip
    command = [word for name, path in flags.items() for word in (f"--{name}", str(path))]
    said = refused(run(tmp_path, "pipeline.evaluate", *command))
    assert "weights.safetensors" in said
    assert "SHA-256" in said
    assert everything(paths.evaluate) == before
    assert not Path("/tmp/tightbound-was-here").exists()


@pytest.mark.skipif(not SOAK, reason="make soak: a hundred thousand files")
def test_a_hundred_thousand_small_pictures(tmp_path: Path):
    """Decoded through Ray Data."""
    (tmp_path / "set").mkdir()
    rng = np.random.default_rng(0)
    for index in range(100_000):
        pixels = rng.integers(0, 256, (4, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "set" / f"{index:06d}.png", compress_level=0)
    data = {"source": "folder", "root": str(tmp_path / "set"), "space": "grey8"}
    (tmp_path / "params.yaml").write_text(params_for(data))
    started = time.monotonic()
    done = run(tmp_path, "pipeline.prepare", "--prepared", "data/prepared")
    assert done.returncode == 0, done.stderr
    assert "Dataset" not in done.stderr
    assert time.monotonic() - started < LONGEST_SECONDS
    assert load_meta(tmp_path / "data" / "prepared").duplicates["all"] == 0
