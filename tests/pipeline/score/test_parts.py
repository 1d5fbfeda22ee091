"""Whatever dies at whatever byte: each row once, whole files only, and the same call goes on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from pipeline.score import __main__ as score, write_part
from pipeline.stage import UserError, load_split, shard_paths
from tests.pipeline import builders
from tests.pipeline.writers import WRITERS
from vae.system import held, listed

ROOT = Path(__file__).resolve().parents[3]
LINUX = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="needs ptrace as Linux has it",
)


def killed(name: str, folder: Path, every: int) -> int:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.writers", name, str(folder), str(every)],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.split()[-1])


@LINUX
@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_kill_at_some_system_calls_of_every_writer(name: str, tmp_path: Path) -> None:
    assert killed(name, tmp_path, every=7) >= 3


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_kill_at_every_system_call_of_every_writer(name: str, tmp_path: Path) -> None:
    assert killed(name, tmp_path, every=1) >= 20


ROWS = pd.DataFrame({"id": ["a", "b", "c"], "log_px": [1.0, 2.0, 3.0]})


@pytest.mark.parametrize("left", ["whole", "empty", "cut", "folder", "of another plan", "hidden"])
def test_what_is_left_is_never_counted(tmp_path: Path, left: str) -> None:
    parts = tmp_path / "s.parquet.parts"
    parts.mkdir()
    for number in (0, 1):
        ids = [f"{number}-{i}" for i in range(3)]
        write_part(parts / f"000000-{number:06d}.parquet", ROWS.assign(id=ids), "p")
    whole = parts / "000000-000001.parquet"
    if left == "whole":
        shutil.copy(whole, parts / ".tmp-123-000000-000001.parquet")
    elif left == "empty":
        (parts / ".tmp-123-000000-000001.parquet").touch()
    elif left == "cut":
        (parts / "000000-000002.parquet").write_bytes(whole.read_bytes()[:-9])
    elif left == "folder":
        (parts / ".tmp-x").mkdir()
    elif left == "of another plan":
        write_part(parts / "000000-000002.parquet", ROWS, "q")
    else:
        shutil.copy(whole, parts / "._000000-000001.parquet")
    assert sum(score._finished(parts, "p").values()) == 6
    assert score._assemble(parts, tmp_path / "s.parquet", "p") == 6
    assert sorted(path.name for path in parts.iterdir()) == [
        "000000-000000.parquet", "000000-000001.parquet", "plan.json",
    ]  # fmt: skip


def test_a_missing_or_damaged_part_is_made_again(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    for number in (0, 2):
        write_part(parts / f"000000-{number:06d}.parquet", ROWS, "p")
    with pytest.raises(UserError, match="lacks parts of the answer; the same command makes"):
        score._assemble(parts, tmp_path / "s.parquet", "p")
    write_part(parts / "000000-000001.parquet", ROWS, "p")
    (parts / "000000-000002.parquet").write_bytes(b"half")
    with pytest.raises(UserError, match="lacks parts"):
        score._assemble(parts, tmp_path / "s.parquet", "p")
    assert set(score._finished(parts, "p")) == {"000000-000000", "000000-000001"}


def test_two_at_once_do_not_meet(tmp_path: Path) -> None:
    parts = tmp_path / "s.parquet.parts"
    parts.mkdir()
    with held(parts), pytest.raises(UserError, match="another process is scoring into"):
        score.score("models:/m/1", tmp_path, tmp_path / "s.parquet")


def test_shards_are_those_that_prepare_wrote(tmp_path: Path) -> None:
    builders.prepared_data(tmp_path / "data")
    train = tmp_path / "data" / "train"
    (train / ".tmp-00000.parquet").write_bytes(b"half")
    (train / "._00000.parquet").write_bytes(b"of another system")
    assert len(load_split(tmp_path / "data", "train")) == 100
    shutil.copy(train / "00000.parquet", train / "00001.parquet")
    with pytest.raises(UserError, match=r"holds 200 examples; meta\.json says 100"):
        load_split(tmp_path / "data", "train")
    (train / "00001.parquet").rename(train / "00002.parquet")
    with pytest.raises(UserError, match=r"lacks a file between 00000\.parquet and 00002"):
        shard_paths(tmp_path / "data", "train")


def test_hidden_names_are_never_listed(tmp_path: Path) -> None:
    for name in ("b.py", "a.py", ".#a.py", "._b.py", "a.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in listed(tmp_path, "*.py")] == ["a.py", "b.py"]
    assert listed(tmp_path / "nothing", "*.py") == []
